"""Classifiers of glyphs: two hidden layers, and a weak head on the first one."""

import jax
from flax import nnx

from .glyphs import CHARACTERS, SIZE


class Classifier(nnx.Module):
    """Maps images (N, SIZE * SIZE) to logits; `weak` reads the first hidden layer."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        classes = len(CHARACTERS)
        self.first = nnx.Linear(SIZE * SIZE, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)
        self.weak_head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(nnx.gelu(self.second(nnx.gelu(self.first(images)))))

    def weak(self, images: jax.Array) -> jax.Array:
        return self.weak_head(nnx.gelu(self.first(images)))


logits = nnx.jit(lambda model, images: model(images))
