"""Problems of block-sparse attention, and what every kernel for it must give."""

import dataclasses
from typing import Any

import jax
import numpy as np

from softlib import masks
from softlib.attention._engine.plan import plan_of
from softlib.attention._engine.scores import (
    Kind,
    LogSoftplus,
    Softmax,
    Softplus,
    StableMax,
)
from softlib.attention._engine.stream import BackwardOperands
from softlib.attention._engine.tiles import Operands, Options
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles.attention import attention as oracle

CAUSAL, SOFTMAX = masks.Causal(), Softmax()
NORMALIZERS: dict[Any, str] = {
    Softmax(): "softmax",
    LogSoftplus(): "softplus",
    Softplus(): "softplus",
    StableMax(): "stablemax",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention.

    Attributes:
        lengths: Limit the keys of each batch entry.
        dense: The axes, out of "bnts", of a boolean array over pairs; None for none.
        bias: Those of a bias, which is NaN where none of its pairs attend. Where -
            follows, -inf excludes a few pairs.
        bias_dtype: Of the bias.
        wide: Whether the output and the gradients are float32, to be added up.
    """

    mask: masks.Mask = CAUSAL
    T: int = 136
    S: int = 200
    N: int = 1
    K: int = 1
    H: int = 64
    E: int = 64
    B: int = 1
    kind: Kind = SOFTMAX
    softcap: float | None = None
    sinks: bool = False
    lengths: tuple[int, ...] | None = None
    dense: str | None = None
    bias: str | None = None
    bias_dtype: str = "float32"
    dtype: str = "bfloat16"
    wide: bool = False
    spread: float = 1.0

    def operands(self) -> Operands:
        random = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(random.normal(size=shape), self.dtype)
        query = self.spread * random.normal(size=(self.B, self.T, self.N, self.H))
        query = jnp.asarray(query, self.dtype)
        key, value = (draw(self.B, self.S, self.K, n) for n in (self.H, self.E))
        mask = self.mask
        if self.lengths is not None:
            mask = mask & masks.Padding(key=np.asarray(self.lengths, np.int32))
        plan = plan_of(mask, (self.T, self.S))
        sinks = jnp.asarray(random.normal(size=self.N), jnp.float32)
        dense, bias = self._on_pairs(mask)
        sinks = sinks if self.sinks else None
        return Operands(*(query, key, value, plan), dense, bias, sinks)

    def attends(self, mask: masks.Mask, dense: Any) -> np.ndarray:
        """Which pairs do, by a mask and the boolean array, (b, n, T, S)."""
        allowed = np.asarray(mask.materialize(self.T, self.S))
        allowed = allowed.reshape(-1, 1, self.T, self.S)
        return allowed if dense is None else allowed & np.asarray(dense)

    def _on_pairs(self, mask: masks.Mask) -> tuple[jax.Array | None, jax.Array | None]:
        """The boolean array and the bias."""
        random = np.random.default_rng(2)
        sizes = {"b": self.B, "n": self.N, "t": self.T, "s": self.S}
        shape_of = lambda axes: [n if axis in axes else 1 for axis, n in sizes.items()]
        dense = bias = None
        if self.dense is not None:
            dense = random.random(shape_of(self.dense)) < 0.6
            if "t" in self.dense:
                dense[..., 5, :] = False  # a query without keys
            dense = jnp.asarray(dense)
        if self.bias is not None:
            bias = 3 * random.normal(size=shape_of(self.bias))
            if "-" in self.bias:
                bias[random.random(bias.shape) < 0.1] = -np.inf
            shared = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
            some = self.attends(mask, dense).any(shared, keepdims=True)
            bias = jnp.asarray(np.where(some, bias, np.nan), self.bias_dtype)
        return dense, bias

    def options(self) -> Options:
        scale = self.H**-0.5
        dtype = jnp.dtype(jnp.float32 if self.wide else self.dtype)
        options = Options(self.kind, scale, self.softcap, None, dtype)
        return dataclasses.replace(options, wide_gradients=self.wide)


def check(
    problem: Problem, adapter: Any, *, c: float = 4.0, through_lse: bool = True
) -> Any:
    """Output, normalizers and gradients against the oracle; they are returned too.

    Args:
        problem: What is computed.
        adapter: The module with the implementations FORWARD and BACKWARD.
        c: Of the tolerance. Errors of a large score are those of its weight, so it has
            to grow with them.
        through_lse: Whether the normalizers have a cotangent.
    """
    operands, options = problem.operands(), problem.options()
    random = np.random.default_rng(1)
    rows = (problem.B, problem.T, problem.N)
    g_out = jnp.asarray(random.normal(size=(*rows, problem.E)), problem.dtype)
    g_lse = through_lse * random.normal(size=rows).astype(np.float32)

    @jax.jit
    def both(operands, g_out, g):
        found = adapter.FORWARD.call(options, operands)
        normalizer = found.normalizer
        if not problem.kind.is_log:
            g = g / jnp.where(normalizer == 0, 1, normalizer)
        given = BackwardOperands(operands, found.out, normalizer, g_out, g)
        return found, adapter.BACKWARD.call(options, given)

    # In NumPy, where to look at a part is no program of its own.
    found, gradient = jax.tree.map(np.asarray, both(operands, g_out, g_lse))
    allowed = problem.attends(operands.plan.mask, operands.dense)
    bias = operands.bias
    if bias is not None:
        bias = np.asarray(bias, np.float64)
    expected = oracle(
        *(np.asarray(x, np.float64) for x in operands[:3]),
        allowed=allowed,
        bias=bias,
        scale=options.scale,
        softcap=problem.softcap,
        sinks=operands.sinks,
        normalizer=NORMALIZERS[problem.kind],
        g_out=np.asarray(g_out, np.float64),
        g_lse=g_lse,
    )
    # Zeros would agree with a kernel that does nothing.
    results = {"out": expected.out, **expected.gradients}
    assert all(result.any() for result in results.values())
    lse = found.normalizer
    if not problem.kind.is_log:
        with np.errstate(divide="ignore"):
            lse = np.log(lse.astype(np.float64))
    length = max(problem.S, problem.T)
    assert_close(lse, expected.lse, dtype=jnp.float32, length=length)
    assert_close(found.out, expected.out, dtype=problem.dtype, length=length, c=c)
    for name in ("query", "key", "value", "bias", "sinks"):
        value = getattr(gradient, name)
        if value is not None:
            wanted = expected.gradients[name]
            assert_close(value, wanted, dtype=problem.dtype, length=length, c=c)
    for x in (found.out, gradient.query, gradient.key, gradient.value):
        assert x.dtype == options.out_dtype
        assert (x != x.astype(problem.dtype)).any() == problem.wide
    _check_nobody(problem, allowed, found, gradient, lse)
    return found, gradient


def _check_nobody(
    problem: Problem, allowed: np.ndarray, found: Any, gradient: Any, lse: Any
) -> None:
    """Exact where nobody attends: to whom, or by whom."""
    some = allowed.any((0, 1))
    nobody, unread = ~some.any(1), ~some.any(0)
    np.testing.assert_array_equal(found.out[:, nobody], 0)
    np.testing.assert_array_equal(gradient.query[:, nobody], 0)
    for found_of in (gradient.key, gradient.value):
        np.testing.assert_array_equal(found_of[:, unread], 0)
    if not problem.sinks:
        np.testing.assert_array_equal(lse[:, nobody], -np.inf)
