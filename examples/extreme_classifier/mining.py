"""Random batches against batches of clusters, with negatives from the batch alone.

The labels of a batch are one that is drawn for each of its definitions; the table of
all labels is never read, so that what a step costs does not depend on their number. A
kind of batches is trained in stretches: after each, definitions are embedded and
clustered anew. A step moves few labels, so that the learning rate is far above that of
the losses that read them all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from language_model.training import Stop
from study import training

from softlib import losses, mining
from softlib.numerics import balanced_kmeans

from . import model as model_
from .glosses import Glosses
from .model import Classifier, unit
from .options import Options
from .scores import Scores, measure

KINDS = ("random", "clusters")


class Stretch(NamedTuple):
    """What is known after one stretch of training.

    Attributes:
        cluster_size: Points of a cluster in it.
        recall: Share of the hardest negatives that were in the batch, at its start.
        scores: Of held-out definitions, at its end.
    """

    cluster_size: int
    recall: float
    scores: Scores


def triplet(
    model: Classifier, words: Array, positives: Array, labels: Array, where: Array
) -> Array:
    """The mean loss over a batch whose labels (B,) are drawn."""
    queries = model.query(words)
    drawn = unit(model.labels[...][jnp.where(labels < 0, 0, labels)])
    found = losses.in_batch_triplet_loss(
        queries @ drawn.T, mining.in_batch_positives(positives, labels), where=where
    )
    return found.sum() / jnp.maximum(where.sum(), 1)


def train(
    kind: str, glosses: Glosses, options: Options, identity: dict[str, Any], stop: Stop
) -> list[Stretch]:
    classifier = model_.build(len(glosses.names), 0.0, options)
    key = jax.random.key(options.seed)
    found = []
    for number, size in enumerate(options.refreshes):
        size = size if kind == "clusters" else 1
        clusters, recall = _clustered(classifier, glosses, size, options)
        batches = Batches(glosses, clusters, options, jax.random.fold_in(key, number))
        training.train(
            classifier,
            training.Plan(
                name=f"{kind}-{number}",
                steps=options.refresh_steps,
                batch_at=batches.at,
                loss=triplet,
                evaluate=lambda model: 1 - measure(model, glosses).precision[0],
                evaluate_every=options.refresh_steps,
                learning_rate=options.mining_rate,
            ),
            folder=options.out / "checkpoints",
            identity=identity,
            stop=stop,
        )
        found.append(Stretch(size, recall, measure(classifier, glosses)))
    return found


def _clustered(
    classifier: Classifier, glosses: Glosses, size: int, options: Options
) -> tuple[Array, float]:
    """Clusters of all definitions; how many of the hardest negatives a batch has.

    That is measured with a few of the definitions, in batches of a share of these.
    """
    trained = glosses.training
    embedded = model_.queries(classifier, jnp.asarray(glosses.words[trained]))
    clusters = _clusters(embedded, size, jax.random.key(options.seed))
    few = jnp.asarray(
        np.random.default_rng(options.seed).permutation(len(trained))[: options.probes]
    )
    probes = _clusters(embedded[few], size, jax.random.key(options.seed))
    batches = mining.ngame_batches(
        probes, batch_size=max(2, options.probes // 16), key=jax.random.key(1)
    )
    recall = _recall(embedded[few], embedded[few], batches)
    return clusters, float(recall.mean())


def _clusters(x: Array, size: int, key: Array) -> Array:
    return jax.jit(balanced_kmeans, static_argnums=1)(x, size, key=key)


_recall = jax.jit(mining.hard_negative_recall)


class Batches:
    """Batches of one stretch, a function of the step alone."""

    def __init__(self, glosses: Glosses, clusters: Array, options: Options, key: Array):
        self._glosses, self._key = glosses, key
        self._clusters, self._size = clusters, options.batch
        self._epoch, self._rows = -1, np.zeros((1, 1), int)

    def at(self, step: int) -> tuple[Any, ...]:
        whole = max(1, len(self._glosses.training) // self._size)
        epoch, place = divmod(step, whole)
        if epoch != self._epoch:
            key = jax.random.fold_in(self._key, epoch)
            batches = mining.ngame_batches(
                self._clusters, batch_size=self._size, key=key
            )
            self._epoch, self._rows = epoch, np.asarray(batches)
        rows = self._rows[place]
        exists = rows >= 0
        points = self._glosses.training[np.where(exists, rows, 0)]
        positives = jnp.asarray(self._glosses.positives[points])
        key = jax.random.fold_in(self._key, step)
        labels = mining.draw_positives(key, positives)
        return self._glosses.words[points], positives, labels, jnp.asarray(exists)
