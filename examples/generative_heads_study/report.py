"""The picture: examples needed by dimension for two laws, and the error on digits."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from study.output import BLUE, ORANGE, SKY, save_picture

COLOURS = (BLUE, ORANGE, SKY)


def draw(path: pathlib.Path, findings: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, (law, heads) in zip(axes, findings["laws"].items(), strict=True):
        for colour, (name, found) in zip(COLOURS, heads.items(), strict=True):
            needed = np.array(found["needed"])
            axis.plot(needed[:, 0], "o-", color=colour, label=name)
        axis.set(title=law, yscale="log", ylabel="examples needed", xlabel="size")
    axes[0].legend(frameon=False)
    save_picture(figure, path)
    plt.close(figure)
