"""The model of the package g2p-en: a GRU that reads letters, one that writes sounds."""

import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from language_model.failures import Failure

from softlib import LinearLogits

from .dictionary import BEGIN, LETTERS, PHONEMES

INSTALL = "pip install --no-deps g2p-en==2.1.0"
PACKAGE, FILE = "g2p_en", "checkpoint20.npz"
CREDIT = "weights of g2p-en by Kyubyong Park and Jongseok Kim, Apache-2.0"

type Parameters = dict[str, jax.Array]


def load(weights: pathlib.Path) -> Parameters:
    """The parameters that `--weights` names; the package is not imported."""
    if weights == pathlib.Path("tiny"):
        return _random(width=8)
    if weights != pathlib.Path("g2p"):
        raise Failure(f"--weights must be g2p or tiny, got {weights}.")
    found = importlib.util.find_spec(PACKAGE)
    places = found.submodule_search_locations if found else None
    for place in places or ():
        if (path := pathlib.Path(place) / FILE).is_file():
            print(CREDIT)
            with np.load(path) as arrays:
                return {name: jnp.asarray(arrays[name]) for name in arrays}
    raise Failure(f"g2p-en is not installed (3 MB): {INSTALL}")


def encode(p: Parameters, letters: jax.Array, lengths: jax.Array) -> jax.Array:
    """The state (B, H) after the letters (B, T) of each word."""

    def step(h: jax.Array, given: Any) -> tuple[jax.Array, None]:
        at, letter = given
        new = _cell(p, "enc", p["enc_emb"][letter], h)
        return jnp.where((at < lengths)[:, None], new, h), None

    start = jnp.zeros((letters.shape[0], p["enc_w_hh"].shape[1]))
    places = jnp.arange(letters.shape[1])
    return jax.lax.scan(step, start, (places, letters.T))[0]


def begin(p: Parameters, h: jax.Array) -> tuple[LinearLogits, jax.Array]:
    """Logits of the first sound, and the state."""
    return step(p, jnp.full(h.shape[0], BEGIN), h)


def step(
    p: Parameters, tokens: jax.Array, h: jax.Array
) -> tuple[LinearLogits, jax.Array]:
    """Logits of the sound after `tokens` (B,), and the state (B, H)."""
    h = _cell(p, "dec", p["dec_emb"][tokens], h)
    return LinearLogits(h, p["fc_w"], bias=p["fc_b"]), h


def _cell(p: Parameters, part: str, x: jax.Array, h: jax.Array) -> jax.Array:
    """Gates r, z, n; r acts on the state's part of n with its bias."""
    of = lambda y, way: y @ p[f"{part}_w_{way}"].T + p[f"{part}_b_{way}"][None]
    x_r, x_z, x_n = jnp.split(of(x, "ih"), 3, -1)
    h_r, h_z, h_n = jnp.split(of(h, "hh"), 3, -1)
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    return (1 - z) * jnp.tanh(x_n + r * h_n) + z * h


def _random(width: int) -> Parameters:
    shapes: dict[str, tuple[int, ...]] = {
        "enc_emb": (len(LETTERS), width),
        "dec_emb": (len(PHONEMES), width),
        "fc_w": (len(PHONEMES), width),
        "fc_b": (len(PHONEMES),),
    }
    for part in ("enc", "dec"):
        for way in ("ih", "hh"):
            shapes[f"{part}_w_{way}"] = (3 * width, width)
            shapes[f"{part}_b_{way}"] = (3 * width,)
    random = np.random.default_rng(0)
    return {
        name: jnp.asarray(random.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }
