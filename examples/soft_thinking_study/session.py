"""A whole run in order: texts, mixtures at their undecided places, what follows."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from language_model.failures import Failure
from smollm2.checkpoints import Pretrained
from smollm2.session import load
from study import output, results
from study.intervals import bootstrap

from . import mixtures, report, texts
from .mixtures import VARIANTS, Followed, Settings
from .options import Options

# Texts are padded to a multiple of this, so that few programs are compiled.
MULTIPLE = 32


def run(options: Options) -> None:
    """Prints which token of a mixture the model follows; leaves numbers, a picture."""
    watch = results.Watch()
    output.make_folder(options.out)
    pretrained = load(options.weights)
    speeches = texts.passages(pretrained, options)
    written, begins = texts.answered(pretrained, options)
    half = options.context // 2
    found = {
        "addresses": probed(pretrained, speeches, [half] * len(speeches), 1, options),
        "answers": probed(pretrained, written, begins, options.per_answer, options),
    }
    findings: dict[str, Any] = {}
    for source, (followed, share) in found.items():
        print(f"{source}: {share:.0%} of the places are undecided")
        findings[source] = {"undecided": share, **summary(followed)}
    both = [
        np.concatenate(pair)
        for pair in zip(*(f for f, _ in found.values()), strict=True)
    ]
    findings["all"] = summary(Followed(*both))
    for name, numbers in findings["all"].items():
        shown = ", ".join(f"{key} {value}" for key, value in numbers.items())
        print(f"{name:9} {shown}")
    findings["positions"] = points(Followed(*both))
    results.record(options.out, options, findings, watch)
    picture = options.out / "report.png"
    report.draw(picture, findings)
    print(f"see {picture}")


def probed(
    pretrained: Pretrained,
    rows: list[np.ndarray],
    begins: list[int],
    most: int,
    options: Options,
) -> tuple[Followed, float]:
    """The mixtures at places of each text, and the share of places that are undecided.

    A place is undecided if at least two tokens are kept, and the heaviest has not
    almost all the weight.
    """
    graph, state = nnx.split(pretrained.model)
    settings = Settings.of(options, pretrained.model.config.vocabulary_size)
    random = np.random.default_rng(options.seed)
    found, undecided, places = [], 0, 0
    for number, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        padded = np.zeros(-(-len(row) // MULTIPLE) * MULTIPLE, np.int32)
        padded[: len(row)] = row
        cache, concepts = mixtures.read(graph, state, settings, padded)
        weights = np.asarray(concepts.weights)
        open_ = (weights[:, 0] <= options.most) & (weights[:, 1] > 0)
        # The law after the last token is of what is not written.
        candidates = np.flatnonzero(open_[begin : len(row)]) + begin
        undecided, places = undecided + len(candidates), places + len(row) - begin
        for place in random.permutation(candidates)[:most]:
            key = jax.random.fold_in(
                jax.random.key(options.seed), 1000 * number + place
            )
            concept = jax.tree.map(lambda x, place=place: x[place], concepts)
            followed = mixtures.follow(
                graph, state, settings, cache, concept, place, key
            )
            found.append(jax.tree.map(np.asarray, followed))
    if not found:
        raise Failure("no place of the texts is undecided; try a greater --most.")
    return Followed(*map(np.stack, zip(*found, strict=True))), undecided / places


def summary(followed: Followed) -> dict[str, Any]:
    """Means over positions with intervals, of each variant."""
    of = lambda name, at: np.asarray(getattr(followed, name), np.float64)[:, at]
    found: dict[str, Any] = {}
    for at, variant in enumerate(VARIANTS):
        names = ("nearest", "same_best", "heaviest", "second", "blend")
        found[variant] = {name: bootstrap(of(name, at)) for name in names}
        found[variant]["chance"] = bootstrap(1 / of("count", at))
    return found


def points(followed: Followed) -> dict[str, list[Any]]:
    """What the picture shows of each position."""
    fields = ("weight", "nearest", "heaviest", "second", "blend")
    return {name: np.asarray(getattr(followed, name)).tolist() for name in fields}
