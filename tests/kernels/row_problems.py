"""Linear heads, and what every kernel for their row statistics must give."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softlib.losses import _engine
from softlib.losses._stream import Head
from softlib.losses._tile import Modifiers, Options, RowStatistics
from softlib.testing import assert_close
from tests.oracles import row_statistics as oracle

FEW = ("lse", "label_logits")
ALL = oracle.STATISTICS


@dataclasses.dataclass(frozen=True)
class Problem:
    """One head."""

    rows: int
    features: int
    classes: int
    dtype: str = "bfloat16"
    statistics: tuple[str, ...] = FEW
    labels: int = 1
    vocab_axis: int = 0
    bias: bool = False
    infinite: bool = False
    per_row: bool = False
    class_where: bool = False
    softcap: float | None = None

    def head(self) -> Head:
        random = np.random.default_rng(0)
        cast = lambda x: jnp.asarray(x, self.dtype)
        weight = random.normal(size=(self.classes, self.features))
        weight *= 2 / np.sqrt(self.features)
        labels = random.integers(-1, self.classes, (self.rows, self.labels))
        factors = lambda: jnp.asarray(random.uniform(0.5, 1.5, self.rows), jnp.float32)
        bias = random.normal(size=self.classes)
        bias[::7] = -np.inf if self.infinite else 0
        return Head(
            cast(random.normal(size=(self.rows, self.features))),
            cast(weight if self.vocab_axis == 0 else weight.T),
            jnp.asarray(labels, jnp.int32),
            Modifiers(
                jnp.asarray(bias, jnp.float32) if self.bias else None,
                factors() if self.per_row else None,
                factors() if self.per_row else None,
                jnp.asarray(random.uniform(size=self.classes) < 0.7)
                if self.class_where
                else None,
            ),
        )

    def options(self) -> Options:
        options = Options(self.statistics, self.softcap, self.vocab_axis)
        return _engine.with_residuals(options)


def cotangents_of(statistics: RowStatistics) -> RowStatistics:
    random = np.random.default_rng(1)
    some = lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32)
    return jax.tree.map(some, _engine.differentiable(statistics))


def expected_of(problem: Problem, head: Head, cotangents: RowStatistics) -> Any:
    bias, scale, temperature, where = head.modifiers[:4]
    known = {"bias": bias, "logit_scale": scale, "temperature": temperature}
    given = {n: x for n, x in cotangents._asdict().items() if x is not None}
    return oracle.row_statistics(
        np.asarray(head.labels),
        None if where is None else np.asarray(where),
        cotangents=given,
        hidden=head.hidden,
        weight=head.weight,
        vocab_axis=problem.vocab_axis,
        logit_softcap=problem.softcap,
        **{name: x for name, x in known.items() if x is not None},
    )


def check_statistics(problem: Problem, found: RowStatistics, expected: Any) -> None:
    length = max(problem.rows, problem.features, problem.classes)
    for key in problem.options().statistics:
        value, wanted = getattr(found, key), expected.values[key]
        if key == "argmax":
            np.testing.assert_array_equal(value, wanted)
        else:
            assert_close(value, wanted, dtype=jnp.float32, length=length)


def check_gradient(problem: Problem, gradient: Any, expected: Any) -> None:
    length = max(problem.rows, problem.features, problem.classes)
    pairs = {
        "hidden": gradient.hidden,
        "weight": gradient.weight,
        "bias": gradient.modifiers.bias,
        "logit_scale": gradient.modifiers.logit_scale,
        "temperature": gradient.modifiers.temperature,
    }
    for key, value in pairs.items():
        if value is not None:
            # Cotangents of 16-bit logits are rounded before they are multiplied.
            wanted = expected.gradients[key]
            assert_close(value, wanted, dtype=problem.dtype, length=length)
