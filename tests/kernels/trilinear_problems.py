"""Problems of attention to pairs of keys, and what every kernel for it must give."""

import math
from typing import Any

import numpy as np

from softlib.attention._engine.plan import plan_of
from softlib.attention._engine.scores import Result
from softlib.attention._engine.stream import Gradient
from softlib.attention._engine.tiles import Operands
from softlib.masks import PerAxis
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles.kronecker import kronecker_attention as oracle


def draw_operands(
    lengths: tuple[int, int, int],
    heads: tuple[int, int],
    features: tuple[int, int],
    mask: PerAxis,
    *,
    batch: int = 1,
    dtype: Any = "float32",
    factor: float = 1.0,
) -> Operands:
    """Of queries and both key axes; `factor` multiplies the queries."""
    random = np.random.default_rng(0)
    T, S1, S2 = lengths
    (N, K), (H, E), B = heads, features, batch
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    query = jnp.asarray(factor * random.normal(size=(B, T, N, H)), dtype)
    outer = (draw(B, S1, K, H), draw(B, S1, K, E))
    plan = plan_of(mask, lengths, (16, 8, 128))
    return Operands(query, draw(B, S2, K, H), draw(B, S2, K, E), plan, outer=(outer,))


def draw_cotangents(operands: Operands) -> tuple[Any, Any]:
    """Of the output and of the log-sum."""
    random = np.random.default_rng(1)
    shape = operands.query.shape[:3]
    assert operands.value is not None
    g = random.normal(size=(*shape, operands.value.shape[-1]))
    g_lse = jnp.asarray(random.normal(size=shape), jnp.float32)
    return jnp.asarray(g, operands.query.dtype), g_lse


def check(
    operands: Operands,
    scale: float,
    found: Result,
    gradients: Gradient,
    cotangents: tuple[Any, Any],
    *,
    rounded: Any,
    lse_dtype: Any,
    factor: float = 1.0,
    c: float = 4.0,
) -> np.ndarray:
    """Compares with the oracle; which rows attend to nothing.

    Args:
        operands: Of the call.
        scale: Of the scores.
        found: By the forward pass.
        gradients: By the backward pass.
        cotangents: As drawn.
        rounded: The dtype to which products round.
        lse_dtype: That of the log-sum.
        factor: Of the queries: scores of that size have rounding errors of their own.
        c: Of the tolerance.
    """
    keys, values = zip(*operands.outer, (operands.key, operands.value), strict=True)
    lengths, (g, g_lse) = operands.plan.lengths, cotangents
    expected = oracle(
        *(operands.query, keys, values),
        allowed=np.asarray(operands.plan.mask.materialize(*lengths))[None, None],
        scale=scale,
        g_out=g,
        g_lse=g_lse,
    )
    length = int(math.prod(lengths) * max(1.0, factor / 100) ** 2)
    assert found.out is not None
    assert found.out.dtype == operands.query.dtype
    assert found.normalizer.dtype == jnp.float32
    assert_close(found.out, expected.out, dtype=rounded, length=length, c=c)
    assert_close(found.normalizer, expected.lse, dtype=lse_dtype, length=length, c=c)
    wanted = expected.gradients
    # Zeros would agree with a kernel that does nothing.
    for right in (expected.out, wanted["query"], *wanted["keys"], *wanted["values"]):
        assert right.any()
    for value, right, like in (
        (gradients.query, wanted["query"], operands.query),
        (gradients.outer[0][0], wanted["keys"][0], keys[0]),
        (gradients.key, wanted["keys"][1], keys[1]),
        (gradients.outer[0][1], wanted["values"][0], values[0]),
        (gradients.value, wanted["values"][1], values[1]),
    ):
        assert value is not None
        assert like is not None
        assert value.dtype == like.dtype
        assert_close(value, right, dtype=rounded, length=length, c=c)
    empty = np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.asarray(found.out, float)[empty], 0)
    np.testing.assert_array_equal(np.asarray(gradients.query, float)[empty], 0)
    return empty
