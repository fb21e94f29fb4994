"""Cross-entropy of a linear head, value and both gradients: softlib against optax."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import optax

from softlib.losses import linear_softmax_cross_entropy

from .measure import Measurement, compare

SHAPES = ((1024, 512, 32768), (2048, 256, 65536))


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows, features, vocabulary, and the axis of the weight that is the vocabulary."""

    shape: tuple[int, int, int]
    vocab_axis: int
    dtype: str = "float32"

    def __str__(self) -> str:
        rows, features, vocabulary = self.shape
        layout = "(V, D)" if self.vocab_axis == 0 else "(D, V)"
        return f"N={rows} D={features} V={vocabulary}, weight {layout}, {self.dtype}"


def operands(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, features, vocabulary = case.shape
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (vocabulary, features) if case.vocab_axis == 0 else (features, vocabulary)
    hidden = jax.random.normal(keys[0], (rows, features), case.dtype)
    weight = jax.random.normal(keys[1], shape, case.dtype) / features**0.5
    return hidden, weight, jax.random.randint(keys[2], (rows,), 0, vocabulary)


def with_gradients(loss: Callable[..., jax.Array]) -> Callable[..., object]:
    mean = lambda hidden, weight, labels: loss(hidden, weight, labels).mean()
    return jax.value_and_grad(mean, argnums=(0, 1))


def programs(case: Case) -> dict[str, Callable[..., object]]:
    def naive(hidden, weight, labels):
        logits = jnp.dot(hidden, weight.T if case.vocab_axis == 0 else weight)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def ours(hidden, weight, labels):
        return linear_softmax_cross_entropy(
            hidden, weight, labels, vocab_axis=case.vocab_axis
        )

    return {"optax on logits": with_gradients(naive), "softlib": with_gradients(ours)}


def run(
    shapes: Sequence[tuple[int, int, int]] = SHAPES, rounds: int = 9
) -> Iterator[tuple[Case, list[Measurement]]]:
    for shape in shapes:
        for vocab_axis in (0, 1):
            case = Case(shape, vocab_axis)
            yield case, compare(programs(case), *operands(case), rounds=rounds)
