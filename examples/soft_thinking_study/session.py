"""A whole run in order: texts, mixtures at their undecided places, what follows."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from language_model.failures import Failure
from smollm2.checkpoints import Pretrained
from smollm2.session import load
from study import output, results

from . import mixtures, report, summaries, texts
from .mixtures import Followed, Settings
from .options import Options

# Texts are padded to a multiple of this, so that few programs are compiled.
MULTIPLE = 64


class Probed(NamedTuple):
    """The laws that follow at P places of some texts.

    Attributes:
        followed: Entries (P, variants).
        texts: The number of the text that each place is in, (P,).
        undecided: Share of all places that could have been taken.
    """

    followed: Followed
    texts: np.ndarray
    undecided: float


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
    for source, some in found.items():
        print(f"{source}: {some.undecided:.0%} of the places are undecided")
        findings[source] = {
            "undecided": some.undecided,
            "positions": len(some.texts),
            **summaries.means(some.followed, some.texts),
        }
    every = joined(*found.values())
    findings["positions"] = len(every.texts)
    findings["all"] = summaries.means(every.followed, every.texts)
    findings["by_weight"] = summaries.by_weight(every.followed, every.texts)
    findings["distances"] = summaries.distances(every.followed)
    for name, numbers in findings["all"].items():
        shown = ", ".join(f"{key} {value}" for key, value in numbers.items())
        print(f"{name:9} {shown}")
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
) -> Probed:
    """The mixtures at places of each text.

    A place is undecided if at least two tokens are kept, and the heaviest has not
    almost all the weight.
    """
    graph, state = nnx.split(pretrained.model)
    settings = Settings.of(options, pretrained.model.config.vocabulary_size)
    random = np.random.default_rng(options.seed)
    found, within, undecided, places = [], [], 0, 0
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
            within.append(number)
    if not found:
        raise Failure("no place of the texts is undecided; try a greater --most.")
    stacked = Followed(*map(np.stack, zip(*found, strict=True)))
    return Probed(stacked, np.array(within), undecided / places)


def joined(one: Probed, other: Probed) -> Probed:
    """The places of both, whose texts have nothing in common."""
    pairs = zip(one.followed, other.followed, strict=True)
    counts = len(one.texts), len(other.texts)
    return Probed(
        Followed(*map(np.concatenate, pairs)),
        np.concatenate([one.texts, one.texts.max() + 1 + other.texts]),
        float(np.average([one.undecided, other.undecided], weights=counts)),
    )
