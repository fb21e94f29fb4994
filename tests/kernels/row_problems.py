"""Linear heads, and what every kernel for their row statistics must give."""

import dataclasses
from typing import Any

import jax
import numpy as np

from softlib.logits._engine import operations
from softlib.logits._engine.head import Head
from softlib.logits._engine.stream import BackwardOperands
from softlib.logits._engine.tile import Modifiers, Options, RowStatistics
from softlib.logits._engine.tile_gradient import RowCotangents
from softlib.testing import assert_close
from tests.host import jnp
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
    weight_dtype: str | None = None  # None: that of hidden
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
            self.cast_weight(weight if self.vocab_axis == 0 else weight.T),
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

    def cast_weight(self, weight: np.ndarray) -> jax.Array:
        """In its dtype, with the values of that of hidden: a kernel may round to it."""
        rounded = jnp.asarray(weight, self.dtype)
        return rounded.astype(self.weight_dtype or self.dtype)

    def options(self) -> Options:
        options = Options(self.statistics, self.softcap, self.vocab_axis)
        return operations.with_residuals(options)


def cotangents_of(statistics: RowStatistics) -> RowStatistics:
    random = np.random.default_rng(1)
    some = lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32)
    return jax.tree.map(some, operations.differentiable(statistics))


def expected_of(problem: Problem, head: Head, cotangents: RowStatistics) -> Any:
    bias, scale, temperature, where = head.modifiers[:4]
    known = {"bias": bias, "scale": scale, "temperature": temperature}
    given = {n: x for n, x in cotangents._asdict().items() if x is not None}
    return oracle.row_statistics(
        np.asarray(head.labels),
        None if where is None else np.asarray(where),
        cotangents=given,
        hidden=head.hidden,
        weight=head.weight,
        vocab_axis=problem.vocab_axis,
        softcap=problem.softcap,
        **{name: x for name, x in known.items() if x is not None},
    )


def check(problem: Problem, adapter: Any) -> None:
    """Both passes against the oracle.

    Where classes are selected also if none is: then lse is -inf and all gradients, save
    that of a label's own logit, are 0, not NaN.

    Args:
        problem: What is computed.
        adapter: The module with the implementations FORWARD and BACKWARD.
    """
    head, options = problem.head(), problem.options()

    @jax.jit
    def both(head, label_factor):
        found = adapter.FORWARD.call(options, head)
        cotangents = cotangents_of(found)
        if cotangents.label_logits is not None:
            of_labels = label_factor * cotangents.label_logits
            cotangents = cotangents._replace(label_logits=of_labels)
        rows = RowCotangents(found.lse, found.mean_logit, cotangents)
        gradient = adapter.BACKWARD.call(options, BackwardOperands(head, rows))
        return found, cotangents, gradient

    found, cotangents, gradient = both(head, np.float32(1))
    expected = expected_of(problem, head, cotangents)
    check_statistics(problem, found, expected)
    check_gradient(problem, gradient, expected)
    if problem.class_where:
        nothing = head.modifiers._replace(class_where=jnp.zeros(problem.classes, bool))
        found, _, gradient = both(head._replace(modifiers=nothing), np.float32(0))
        np.testing.assert_array_equal(found.lse, -np.inf)
        np.testing.assert_array_equal(found.mean_logit, 0)
        np.testing.assert_array_equal(gradient.hidden, 0)
        np.testing.assert_array_equal(gradient.weight, 0)


def filtered_and_not(options: Options, head: Head) -> tuple[Any, Any, Any]:
    """The arguments (head, rows) of a backward pass, and what it gives in plain JAX.

    By the stream, with the filter of the options and without it.
    """
    unfiltered = dataclasses.replace(options, gradient_filter_eps=None)
    stream = next(i for i in operations.LINEAR.implementations if i.name == "xla")
    plain = operations.LINEAR_GRADIENT.plain.call

    @jax.jit
    def both(head):
        statistics = stream.call(options, head)
        rows = RowCotangents(statistics.lse, None, cotangents_of(statistics))
        given = BackwardOperands(head, rows)
        return rows, plain(options, given), plain(unfiltered, given)

    rows, expected, everything = both(head)
    return (head, rows), expected, everything


def check_statistics(problem: Problem, found: RowStatistics, expected: Any) -> None:
    length = max(problem.rows, problem.features, problem.classes)
    for key in problem.options().statistics:
        value, wanted = getattr(found, key), expected.values[key]
        if key == "argmax":
            np.testing.assert_array_equal(value, wanted)
        else:
            assert_close(value, wanted, dtype=jnp.float32, length=length)


def check_gradient(problem: Problem, gradient: Any, expected: Any) -> None:
    assert gradient.weight.dtype == (problem.weight_dtype or problem.dtype)
    length = max(problem.rows, problem.features, problem.classes)
    pairs = {
        "hidden": gradient.hidden,
        "weight": gradient.weight,
        "bias": gradient.modifiers.bias,
        "scale": gradient.modifiers.scale,
        "temperature": gradient.modifiers.temperature,
    }
    for key, value in pairs.items():
        if value is not None:
            # Cotangents of 16-bit logits are rounded before they are multiplied.
            wanted = expected.gradients[key]
            assert_close(value, wanted, dtype=problem.dtype, length=length)
