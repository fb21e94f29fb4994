"""A small network whose last layer is trained with similarity and distance."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from softlib import losses, numerics

from .digits import Images
from .options import Options

CLASSES = 10
DEPTH = 200  # nearest images that are looked at
type Parameters = dict[str, Array]


class Seen(NamedTuple):
    """What the network says of images, and how well it knows such images.

    Attributes:
        logits: (N, 10).
        features: (N, F).
        similarity: Nearest training images that agree.
        nearest: Distance to the nearest of them.
        distance: Its quantile among calibration images.
    """

    logits: Array
    features: Array
    similarity: Array
    nearest: Array
    distance: Array


class Verified(NamedTuple):
    """A trained network with what its verification needs."""

    parameters: Parameters
    train: Images
    features: Array
    predictions: Array
    calibration: Seen
    calibration_labels: np.ndarray

    def see(self, images: Images) -> Seen:
        """The same of other images."""
        z, features = forward(self.parameters, images.pixels)
        depth = similarity(features, z, self.features, self.predictions, self.train)
        used = self.calibration.similarity > 0
        d = numerics.distance_quantile(
            depth.nearest,
            self.calibration.nearest,
            jnp.asarray(self.calibration_labels),
            num_classes=CLASSES,
            where=used,
        )
        return Seen(z, features, *depth, d)


@jax.jit
def forward(p: Parameters, pixels: Any) -> tuple[Array, Array]:
    hidden = jax.nn.relu(pixels @ p["w1"] + p["b1"])
    features = jnp.tanh(hidden @ p["w2"] + p["b2"])
    return features @ p["w3"] + p["b3"], features


def similarity(
    features: Array,
    logits: Array,
    keys: Array,
    predictions: Array,
    train: Images,
    itself: Array | None = None,
) -> numerics.SimilarityDepth:
    return numerics.similarity_depth(
        features,
        keys,
        logits.argmax(-1),
        predictions,
        jnp.asarray(train.labels),
        exclude_index=itself,
        max_depth=DEPTH,
    )


def fit(train: Images, calibration: Images, options: Options, seed: int) -> Verified:
    """Trains by cross-entropy, then the last layer by the loss of the paper."""
    p = _start(jax.random.key(seed), train.pixels.shape[1], options.width)
    order = np.random.default_rng([seed, 1])
    # The values with which it is softmax.
    count = len(train.labels)
    known = (np.full(count, np.e - 2), np.ones(count))
    p = _train(p, train, known, tuple(p), order, options)
    z, features = forward(p, train.pixels)
    itself = jnp.arange(count)
    own = similarity(features, z, features, z.argmax(-1), train, itself)
    theirs_z, theirs = forward(p, calibration.pixels)
    depth = similarity(theirs, theirs_z, features, z.argmax(-1), train)
    quantile = functools.partial(
        numerics.distance_quantile,
        calibration_nearest=depth.nearest,
        calibration_labels=jnp.asarray(calibration.labels),
        num_classes=CLASSES,
        where=depth.depth > 0,
    )
    known = (np.asarray(own.depth), np.asarray(quantile(own.nearest)))
    p = _train(p, train, known, ("w3", "b3"), order, options)
    # Features are as before, so that neighbours are too; predictions may not be.
    z, features = forward(p, train.pixels)
    theirs_z, theirs = forward(p, calibration.pixels)
    depth = similarity(theirs, theirs_z, features, z.argmax(-1), train)
    d = quantile(depth.nearest, where=depth.depth > 0)
    seen = Seen(theirs_z, theirs, *depth, d)
    return Verified(p, train, features, z.argmax(-1), seen, calibration.labels)


def _start(key: Array, inputs: int, width: int) -> Parameters:
    sizes = ((inputs, 2 * width), (2 * width, width), (width, CLASSES))
    p = {}
    for number, (size, one) in enumerate(
        zip(sizes, jax.random.split(key, 3), strict=True), 1
    ):
        p[f"w{number}"] = jax.random.normal(one, size) / size[0] ** 0.5
        p[f"b{number}"] = jnp.zeros(size[1])
    return p


def _train(
    p: Parameters,
    train: Images,
    known: tuple[np.ndarray, np.ndarray],
    names: tuple[str, ...],
    order: np.random.Generator,
    options: Options,
) -> Parameters:
    """Adam on the parameters of these names, with images turned over at random."""
    schedule = optax.cosine_decay_schedule(3e-3, options.steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-2)

    @jax.jit
    def step(moving, fixed, state, pixels, labels, q, d):
        def loss(moving):
            z, _ = forward(fixed | moving, pixels)
            return losses.sdm_loss(z, labels, q, d).mean()

        updates, state = optimizer.update(jax.grad(loss)(moving), state, moving)
        return optax.apply_updates(moving, updates), state

    moving = {name: p[name] for name in names}
    fixed = {name: p[name] for name in p if name not in names}
    state = optimizer.init(moving)
    for _ in range(options.steps):
        rows = order.integers(len(train.labels), size=options.batch)
        q, d = (np.asarray(array[rows], np.float32) for array in known)
        arrays = (train.pixels[rows], train.labels[rows], q, d)
        moving, state = step(moving, fixed, state, *arrays)
    return fixed | moving
