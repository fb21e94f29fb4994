"""A problem for each family of kernels, at the sizes where it is checked and timed."""

import functools
import importlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from softlib import LinearLogits, attention, losses, masks, softmax

from . import oracles
from .problem import DTYPES, EVERYWHERE, Oracle, Problem, Program, Size


# ------------------------------------------------------------------------- linear heads
def _head(rows: int, features: int, classes: int) -> Size:
    return Size(
        ((rows, features), (classes, features), (rows,)),
        flops=2 * rows * features * classes,
        moved=features * (rows + classes),
        integers={2: classes},
        scales={1: features**-0.5},
    )


def _cross_entropy(implementation: str | None) -> Program:
    def program(hidden: Any, weight: Any, labels: Any) -> Any:
        logits = LinearLogits(hidden, weight, implementation=implementation)
        return losses.softmax_cross_entropy(logits, labels)

    return program


def _tokamax_cross_entropy(name: Literal["mosaic_tpu", "chunked_xla"]) -> Program:
    def program(hidden: Any, weight: Any, labels: Any) -> Any:
        tokamax: Any = importlib.import_module("tokamax")
        # It takes (D, V): one pass over the weight more, of a hundred products with it.
        return tokamax.linear_softmax_cross_entropy_loss(
            hidden, labels, weight.T, reduction="none", implementation=name
        )

    return program


def _jax_cce_sum(hidden: Any, weight: Any, labels: Any) -> Any:
    """Its mean as the sum, whose gradients are those of all losses, cotangents 1."""
    package: Any = importlib.import_module("jax_cce")
    return package.linear_cross_entropy(hidden, weight, labels) * len(labels)


def _stored_logits(hidden: Any, weight: Any, labels: Any) -> Any:
    import optax

    logits = jnp.matmul(hidden, weight.T, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


# ---------------------------------------------------------------------------- attention
CAUSAL = masks.Causal()
# At the edges of tiles, and between them.
_QUERIES = (0, 1, 63, 64, 127, 128, 129, 511, 512, 513, 1023, 1024, 1500, 3333, 5120)


def _attention_size(
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    features: int,
    mask: masks.Mask,
    *,
    share: float = 0.5,
    some: bool = False,
) -> Size:
    """`heads` are those of queries and keys; `share` of the pairs attend."""
    keys = (batch, tokens, heads[1], features)
    late = (tokens // 2, tokens - 130, tokens - 2, tokens - 1)
    return Size(
        ((batch, tokens, heads[0], features), keys, keys),
        flops=4 * batch * heads[0] * tokens**2 * features * share,
        moved=2 * batch * tokens * sum(heads) * features,
        # Weights that differ, or an error in one of them would vanish in their mean.
        scales={0: 3.0},
        options={"mask": mask},
        queries=(*_QUERIES, *late) if some else (),
    )


def _attention(implementation: str | None, *, mask: masks.Mask) -> Program:
    return functools.partial(
        attention.dot_product_attention, mask=mask, implementation=implementation
    )


def _jax_nn_attention(name: Literal["xla", "cudnn"]) -> Program:
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=name
    )


def _tokamax_attention(query: Any, key: Any, value: Any) -> Any:
    tokamax: Any = importlib.import_module("tokamax")
    return tokamax.dot_product_attention(query, key, value, is_causal=True)


def _radial(frame: int, frames: float, heads: int, features: int) -> Size:
    mask, tokens = masks.Radial(tokens_per_frame=frame), int(frame * frames)
    share = mask.density(tokens)
    return _attention_size(1, tokens, (heads, heads), features, mask, share=share)


def _long_radial(*, some: bool) -> Size:
    """720p video of 33 frames, as in the benchmarks of the paper."""
    mask, tokens = masks.Radial(tokens_per_frame=3600), 118_800
    share = mask.density(tokens)
    return _attention_size(1, tokens, (4, 4), 128, mask, share=share, some=some)


# ----------------------------------------------------------------------------- decoding
def _decode_size(batch: int, keys: int, heads: int, key_heads: int, d: int) -> Size:
    stored = (batch, keys, key_heads, d)
    return Size(
        ((batch, 1, heads, d), stored, stored, (batch,)),
        flops=4 * batch * heads * keys * d,
        moved=2 * batch * keys * key_heads * d,
        integers={3: keys},
        scales={0: 3.0},
    )


def _decode(implementation: str | None, *, phi: float | None) -> Program:
    """Up to a quarter of the cache is empty."""

    def program(query: Any, key: Any, value: Any, missing: Any) -> Any:
        return attention.decode_attention(
            query,
            key,
            value,
            key_value_seq_lengths=key.shape[1] - missing // 4,
            phi=phi,
            implementation=implementation,
        )

    return program


def _jax_nn_decode(name: Literal["xla", "cudnn"]) -> Program:
    def program(query: Any, key: Any, value: Any, missing: Any) -> Any:
        lengths = key.shape[1] - missing // 4
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, implementation=name
        )

    return program


# ----------------------------------------------------------------------- pairs of keys
def _simplicial_size(
    tokens: int, heads: int, features: int, windows: tuple[int, int]
) -> Size:
    shape = (1, tokens, heads, features)
    pairs = windows[0] * windows[1]
    return Size(
        (shape,) * 5,
        flops=4 * heads * tokens * pairs * features,
        moved=6 * heads * tokens * features,
        options={"windows": windows},
    )


def _simplicial(implementation: str | None, *, windows: tuple[int, int]) -> Program:
    return functools.partial(
        attention.two_simplicial_attention,
        window1=windows[0],
        window2=windows[1],
        implementation=implementation,
    )


# ------------------------------------------------------------------------------ softmax
def _rows(rows: int, columns: int, *, written: bool) -> Size:
    return Size(((rows, columns),), moved=rows * columns * (1 + written))


def _map_sizes(*, written: bool) -> dict[str, Size]:
    return {
        "dry": _rows(256, 4104, written=written),
        "aligned": _rows(1024, 4096, written=written),
        "ragged": _rows(1031, 4099, written=written),
        "shipped": _rows(136, 131_072, written=written),
        "large": _rows(8192, 131_072, written=written),
    }


def _map(
    name: str, oracle: Oracle, function: Program, peer: Program, *, written: bool
) -> Problem:
    """A function of the last axis, which kernels of more devices and dtypes compute."""
    return Problem(
        name,
        lambda implementation: functools.partial(
            function, implementation=implementation
        ),
        oracle,
        _map_sizes(written=written),
        peers={"jax.nn": functools.partial(peer, axis=-1)},
        targets=EVERYWHERE | {"blackwell"},
        dtypes=DTYPES | {"cuda": ("bfloat16", "float16", "float32")},
    )


_DECODE_SIZES = {
    "dry": _decode_size(2, 1032, 2, 1, 64),
    "aligned": _decode_size(2, 2048, 8, 2, 128),
    "ragged": _decode_size(3, 1240, 8, 2, 64),
    "shipped": _decode_size(24, 4096, 32, 8, 128),
    "large": _decode_size(64, 32_768, 32, 8, 128),
}
_DECODE_PEERS = {"jax.nn xla": _jax_nn_decode("xla"), "cuDNN": _jax_nn_decode("cudnn")}

PROBLEMS = (
    Problem(
        "cross-entropy of a linear head",
        _cross_entropy,
        oracles.cross_entropy,
        {
            "dry": _head(64, 64, 2056),
            "aligned": _head(256, 256, 4096),
            "ragged": _head(301, 192, 5003),
            "shipped": _head(2048, 2304, 5000),
            "large": _head(8192, 2304, 256_000),
        },
        (0, 1),
        {
            "stored logits": _stored_logits,
            "tokamax mosaic_tpu": _tokamax_cross_entropy("mosaic_tpu"),
            "tokamax chunked_xla": _tokamax_cross_entropy("chunked_xla"),
            "jax-cce": _jax_cce_sum,
        },
    ),
    Problem(
        "causal attention",
        _attention,
        oracles.attention,
        {
            "dry": _attention_size(1, 136, (2, 1), 64, CAUSAL),
            "aligned": _attention_size(1, 512, (4, 2), 128, CAUSAL),
            "ragged": _attention_size(2, 391, (4, 2), 64, CAUSAL),
            "shipped": _attention_size(2, 8192, (16, 4), 128, CAUSAL, some=True),
            "large": _attention_size(2, 8192, (16, 4), 128, CAUSAL),
        },
        (0, 1, 2),
        {
            "jax.nn xla": _jax_nn_attention("xla"),
            "cuDNN": _jax_nn_attention("cudnn"),
            "tokamax": _tokamax_attention,
        },
    ),
    Problem(
        "radial attention",
        _attention,
        oracles.attention,
        {
            "dry": _radial(48, 3, 1, 64),
            "aligned": _radial(256, 6, 2, 128),
            "ragged": _radial(100, 14.09, 1, 64),
            "shipped": _long_radial(some=True),
            "large": _long_radial(some=False),
        },
        (0, 1, 2),
    ),
    Problem(
        "decode attention",
        functools.partial(_decode, phi=None),
        oracles.decode,
        _DECODE_SIZES,
        peers=_DECODE_PEERS,
    ),
    Problem(
        "decode attention, unified maximum",
        functools.partial(_decode, phi=0.0),
        oracles.decode,
        _DECODE_SIZES,
        peers=_DECODE_PEERS,
        # Weights relative to phi leave the range of float16.
        dtypes=DTYPES | {"cuda": ("bfloat16",)},
    ),
    Problem(
        "2-simplicial attention",
        _simplicial,
        oracles.simplicial,
        {
            "dry": _simplicial_size(128, 1, 64, (8, 4)),
            "aligned": _simplicial_size(256, 2, 128, (64, 16)),
            "ragged": _simplicial_size(203, 2, 64, (64, 16)),
            "shipped": _simplicial_size(256, 2, 128, (64, 16)),
            "large": _simplicial_size(8192, 8, 128, (64, 16)),
        },
        (0, 1, 2, 3, 4),
    ),
    _map("softmax", oracles.softmax, softmax.softmax, jax.nn.softmax, written=True),
    _map(
        *("logsumexp", oracles.logsumexp, softmax.logsumexp, jax.nn.logsumexp),
        written=False,
    ),
)
BY_NAME = {problem.name: problem for problem in PROBLEMS}
