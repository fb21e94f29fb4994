"""Times of tiles that were measured on a device, beside what the cost models say.

`make bench-accelerator ARGS=--sweep` writes one file for each device into `measured/`,
from which a model's estimate of a tile is corrected. A device without a file, and a
kernel that its file lacks, keep the estimates. Files are part of the package, so the
choice of a tile stays a pure function of shapes, dtypes and the device.
"""

import functools
import importlib.resources
import json
import math
import statistics
from collections import defaultdict
from typing import Any

# A file is {"kernels": {name: [record, ...]}, ...} with what `record` returns.
FOLDER = importlib.resources.files(__package__) / "measured"


def factor(device: str, kernel: str, sizes: tuple[int, ...]) -> float:
    """The measured by the modelled time of a tile, that of the default tile being 1.

    The median over the shapes that were swept; infinite if the tile ran at none of
    them. Sizes that were not swept have the median of those that ran, so that a model
    which is right but for a constant changes no choice.

    Args:
        device: The compiler's name, as of `_devices`.
        kernel: The name in the file.
        sizes: Of the tile, in the order of the cost model.
    """
    return _factors(device).get(kernel, _NONE).of(sizes)


def record(
    sizes: tuple[int, ...],
    shape: str,
    *,
    ratio: float | None,
    modelled: float,
) -> dict[str, Any]:
    """An entry of a file.

    Args:
        sizes: Of the tile.
        shape: Of the problem, for a reader.
        ratio: The time by that of the default tile, in turn; None if it did not run.
        modelled: The same by the model, without correction.
    """
    measured = ratio if ratio is None else round(ratio, 4)
    rounded = round(modelled, 4)
    return {
        "sizes": list(sizes),
        "shape": shape,
        "ratio": measured,
        "modelled": rounded,
    }


class _Corrections:
    def __init__(self, records: list[dict[str, Any]]) -> None:
        found: defaultdict[tuple[int, ...], list[float]] = defaultdict(list)
        for each in records:
            ran = found[tuple(each["sizes"])]
            if each["ratio"] is not None:
                ran.append(each["ratio"] / each["modelled"])
        self._factors = {
            sizes: statistics.median(ran) if ran else math.inf
            for sizes, ran in found.items()
        }
        finite = [x for x in self._factors.values() if math.isfinite(x)]
        self._other = statistics.median(finite) if finite else 1.0

    def of(self, sizes: tuple[int, ...]) -> float:
        return self._factors.get(sizes, self._other)


_NONE = _Corrections([])


@functools.cache
def _factors(device: str) -> dict[str, _Corrections]:
    file = FOLDER / f"{device}.json"
    if not file.is_file():
        return {}
    kernels = json.loads(file.read_text())["kernels"]
    return {name: _Corrections(records) for name, records in kernels.items()}
