"""What `benchmarks/accelerator.py` computes: a problem for each family of kernels.

Each is a function of arrays, at a small ragged size to be checked and at a large one to
be timed, with peers that compute the same.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from softlib import LinearLogits, attention, losses, masks, softmax

type Program = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of one problem.

    Attributes:
        shapes: Of the arrays, all bfloat16; integers below `high` if that is given.
        integers: Exclusive upper bounds of arrays of integers, by position.
        scales: Standard deviations other than 1, by position.
        flops: Multiplications and additions that the definition asks for, forward.
        moved: Bytes read and written at least, forward.
    """

    shapes: tuple[tuple[int, ...], ...]
    flops: float
    moved: float
    integers: Mapping[int, int] = dataclasses.field(default_factory=dict)
    scales: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def arrays(self, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
        found = []
        for position, shape in enumerate(self.shapes):
            key = jax.random.fold_in(jax.random.key(0), position)
            if position in self.integers:
                high = self.integers[position]
                found.append(jax.random.randint(key, shape, 0, high))
            else:
                normal = jax.random.normal(key, shape, jnp.float32)
                scale = self.scales.get(position, 1.0)
                found.append((scale * normal).astype(dtype))
        return found


@dataclasses.dataclass(frozen=True)
class Problem:
    """One computation.

    Attributes:
        name: Of it.
        program: Of an `implementation`, to the function of arrays.
        small: Where it is checked.
        large: Where it is timed.
        differentiated: Positions of the arrays; empty if there is no gradient.
        peers: Other functions of the same arrays.
        definition: What is right; None: the implementation `reference`.
    """

    name: str
    program: Callable[[str | None], Program]
    small: Size
    large: Size
    differentiated: tuple[int, ...] = ()
    peers: Mapping[str, Program] = dataclasses.field(default_factory=dict)
    definition: Program | None = None


def gradient_of(program: Program, positions: tuple[int, ...]) -> Program:
    """Half the squared norm of the result, differentiated."""

    def norm(*arrays: Any) -> Any:
        return (program(*arrays).astype(jnp.float32) ** 2).sum() / 2

    return jax.grad(norm, argnums=positions)


# ------------------------------------------------------------------------- linear heads
def _head(rows: int, features: int, classes: int) -> Size:
    return Size(
        ((rows, features), (classes, features), (rows,)),
        flops=2 * rows * features * classes,
        moved=2 * features * (rows + classes),
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


def _stored_logits(hidden: Any, weight: Any, labels: Any) -> Any:
    import optax

    logits = jnp.matmul(hidden, weight.T, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


# ---------------------------------------------------------------------------- attention
def _attention_size(
    batch: int, tokens: int, heads: int, key_heads: int, features: int, share: float
) -> Size:
    keys = (batch, tokens, key_heads, features)
    return Size(
        ((batch, tokens, heads, features), keys, keys),
        flops=4 * batch * heads * tokens**2 * features * share,
        moved=4 * batch * tokens * (heads + key_heads) * features,
    )


def _attention(implementation: str | None, mask: masks.Mask) -> Program:
    return functools.partial(
        attention.dot_product_attention, mask=mask, implementation=implementation
    )


def _jax_nn_attention(name: str | None) -> Program:
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=name
    )


def _tokamax_attention(query: Any, key: Any, value: Any) -> Any:
    tokamax: Any = importlib.import_module("tokamax")
    return tokamax.dot_product_attention(query, key, value, is_causal=True)


def _decode_size(batch: int, keys: int, heads: int, key_heads: int, d: int) -> Size:
    stored = (batch, keys, key_heads, d)
    return Size(
        ((batch, 1, heads, d), stored, stored, (batch,)),
        flops=4 * batch * heads * keys * d,
        moved=4 * batch * keys * key_heads * d,
        integers={3: keys},
    )


def _decode(implementation: str | None) -> Program:
    def program(query: Any, key: Any, value: Any, missing: Any) -> Any:
        return attention.decode_attention(
            query,
            key,
            value,
            key_value_seq_lengths=key.shape[1] - missing // 4,
            phi=0.0,
            implementation=implementation,
        )

    return program


def _jax_nn_decode(query: Any, key: Any, value: Any, missing: Any) -> Any:
    lengths = key.shape[1] - missing // 4
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths
    )


def _simplicial_size(tokens: int, heads: int, features: int, pairs: int) -> Size:
    shape = (1, tokens, heads, features)
    return Size(
        (shape,) * 5,
        flops=4 * heads * tokens * pairs * features,
        moved=12 * heads * tokens * features,
    )


def _simplicial(implementation: str | None, windows: tuple[int, int]) -> Program:
    return functools.partial(
        attention.two_simplicial_attention,
        window1=windows[0],
        window2=windows[1],
        implementation=implementation,
    )


# ------------------------------------------------------------------------------ softmax
def _rows(rows: int, columns: int, *, written: bool) -> Size:
    count = rows * columns
    moved = 2 * count * (1 + written)
    return Size(((rows, columns),), flops=0, moved=moved)


RADIAL = masks.Radial(tokens_per_frame=3600)
CAUSAL = masks.Causal()
PROBLEMS = (
    Problem(
        "cross-entropy of a linear head",
        _cross_entropy,
        _head(301, 192, 5003),
        _head(8192, 2304, 256_000),
        (0, 1),
        {
            "stored logits": _stored_logits,
            "tokamax mosaic_tpu": _tokamax_cross_entropy("mosaic_tpu"),
            "tokamax chunked_xla": _tokamax_cross_entropy("chunked_xla"),
        },
    ),
    Problem(
        "causal attention",
        functools.partial(_attention, mask=CAUSAL),
        _attention_size(2, 391, 4, 2, 64, 0.5),
        _attention_size(2, 8192, 16, 4, 128, 0.5),
        (0, 1, 2),
        {
            "jax.nn xla": _jax_nn_attention("xla"),
            "jax.nn cudnn": _jax_nn_attention("cudnn"),
            "tokamax": _tokamax_attention,
        },
    ),
    Problem(
        "radial attention",
        functools.partial(_attention, mask=RADIAL),
        _attention_size(1, 7500, 1, 1, 64, 1.0),
        _attention_size(1, 118_800, 4, 4, 128, RADIAL.density(118_800)),
        (0, 1, 2),
    ),
    Problem(
        "decode attention",
        _decode,
        _decode_size(3, 1234, 8, 2, 64),
        _decode_size(64, 32_768, 32, 8, 128),
        (),
        {"jax.nn xla": _jax_nn_decode},
    ),
    Problem(
        "2-simplicial attention",
        functools.partial(_simplicial, windows=(64, 16)),
        _simplicial_size(200, 2, 64, 64 * 16),
        _simplicial_size(8192, 8, 128, 64 * 16),
        (0, 1, 2, 3, 4),
    ),
    Problem(
        "softmax",
        lambda name: functools.partial(softmax.softmax, implementation=name),
        _rows(1031, 4099, written=True),
        _rows(8192, 131_072, written=True),
        (),
        {"jax.nn": functools.partial(jax.nn.softmax, axis=-1)},
        functools.partial(jax.nn.softmax, axis=-1),
    ),
    Problem(
        "logsumexp",
        lambda name: functools.partial(softmax.logsumexp, implementation=name),
        _rows(1031, 4099, written=False),
        _rows(8192, 131_072, written=False),
        (),
        {"jax.nn": functools.partial(jax.nn.logsumexp, axis=-1)},
        functools.partial(jax.nn.logsumexp, axis=-1),
    ),
)
