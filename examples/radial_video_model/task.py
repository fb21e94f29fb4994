"""The task: fill in hidden patches of a clip, better than copying the nearest frame."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from .options import Options
from .video import PLACES


def hidden_tubes(
    random: np.random.Generator, frames: int, options: Options
) -> np.ndarray:
    """(frames, places), True where hidden; a place changes only every `tube` frames."""
    tubes = -(-frames // options.tube)
    hidden = random.random((tubes, PLACES)) < options.hidden_percent / 100
    return np.repeat(hidden, options.tube, axis=0)[:frames]


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips of a given number of frames, a function of the seed and the step alone."""

    latents: np.ndarray
    frames: int
    options: Options

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Latents (1, frames, places, components) and hidden (1, frames, places)."""
        random = np.random.default_rng([self.options.seed, step])
        start = random.integers(0, len(self.latents) - self.frames + 1)
        hidden = hidden_tubes(random, self.frames, self.options)
        return self.latents[None, start : start + self.frames], hidden[None]


@jax.jit
def nearest_visible(latents: Array, hidden: Array) -> Array:
    """Hidden patches replaced by the same place in the nearest frame that shows it.

    Of two frames as near the earlier one; the background (0) where none does.
    """
    frame = jnp.arange(latents.shape[1])
    offset = frame[None, :] - frame[:, None]  # of the frame that is copied from
    order = (2 * jnp.abs(offset) + (offset > 0))[None, :, :, None]
    unseen = 2 * latents.shape[1] + 1
    order = jnp.where(hidden[:, None], unseen, order)
    copied = jnp.take_along_axis(latents, order.argmin(2)[..., None], axis=1)
    return jnp.where(order.min(2)[..., None] == unseen, 0, copied)


def mean_loss(model: nnx.Module, latents: Array, hidden: Array) -> Array:
    """Mean squared error over the hidden patches; the visible ones count nothing."""
    error = jnp.square(model(latents, hidden) - latents).mean(-1)
    return jnp.where(hidden, error, 0).sum() / jnp.maximum(hidden.sum(), 1)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The frames after the training frames, with several choices of hidden patches.

    The same patches are hidden whether the frames are read at once or in short clips.
    """

    latents: np.ndarray
    hidden: np.ndarray

    @classmethod
    def of(cls, latents: np.ndarray, options: Options) -> "HeldOut":
        random = np.random.default_rng(options.seed)
        hidden = [
            hidden_tubes(random, len(latents), options) for _ in range(options.draws)
        ]
        return cls(latents, np.stack(hidden))

    def predictions(
        self, predict: Callable[[Array, Array], Array], clip: int
    ) -> np.ndarray:
        """(draws, frames, places, components), from clips of `clip` frames."""
        parts = [
            [
                predict(
                    jnp.asarray(self.latents[None, i : i + clip]),
                    jnp.asarray(hidden[None, i : i + clip]),
                )[0]
                for i in range(0, len(self.latents), clip)
            ]
            for hidden in self.hidden
        ]
        return np.stack([np.concatenate(part) for part in parts])

    def error(self, predictions: np.ndarray) -> float:
        """Of the hidden patches, relative to predicting the background (1)."""
        return float(self._squares(predictions) / self._squares(0 * predictions))

    def _squares(self, predictions: np.ndarray) -> float:
        squares = np.square(predictions - self.latents).mean(-1)
        return float(squares[self.hidden].mean(dtype=float))
