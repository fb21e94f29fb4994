"""Computations that a device is asked for: sizes, programs, answers in float64."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

type Program = Callable[..., Any]
type Oracle = Callable[..., list[np.ndarray]]

# Cross-entropy, attention and the rest have kernels on these; softmax on Blackwell too.
EVERYWHERE = frozenset({"tpu", "hopper"})
# The first dtype is the one that is timed.
DTYPES = {"tpu": ("bfloat16", "float32"), "cuda": ("bfloat16", "float16")}
CHECKED = ("aligned", "ragged", "shipped")


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of one problem.

    Attributes:
        shapes: Of the arrays; integers below `high` if that is given, else floating.
        flops: Multiplications and additions that the definition asks for, forward.
        moved: Numbers read and written at least, forward.
        integers: Exclusive upper bounds of arrays of integers, by position.
        scales: Standard deviations other than 1, by position.
        options: Of the program, and of its oracle.
        queries: Of the second axis of the result those that are compared; their
            cotangents are the only ones that are not 0. Empty: all of them.
    """

    shapes: tuple[tuple[int, ...], ...]
    flops: float = 0.0
    moved: float = 0.0
    integers: Mapping[int, int] = dataclasses.field(default_factory=dict)
    scales: Mapping[int, float] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    queries: tuple[int, ...] = ()

    def shapes_and_dtypes(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        return [
            jax.ShapeDtypeStruct(shape, jnp.int32 if i in self.integers else dtype)
            for i, shape in enumerate(self.shapes)
        ]

    def arrays(self, dtype: Any) -> list[jax.Array]:
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

    def cotangent(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        """Random numbers in the shape and dtype of the result."""
        normal = jax.random.normal(jax.random.key(1), like.shape, jnp.float32)
        if self.queries:
            kept = np.isin(np.arange(like.shape[1]), self.queries)
            normal = jnp.where(kept[None, :, None, None], normal, 0)
        return normal.astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One computation.

    Attributes:
        name: Of it.
        program: Of an `implementation` and the options of a size, to the function of
            arrays.
        oracle: Of arrays, a cotangent and the options of a size: the result and the
            gradients in float64. Of a size with `queries` it gets these too.
        sizes: By name: `dry` for the interpreter, `aligned`, `ragged` and `shipped`
            to be checked, `large` to be timed. `shipped` has the tiles of `large`.
        differentiated: Positions of the arrays; empty if no kernel has a gradient.
        peers: Other functions of the arrays, which compute the same.
        targets: Devices for which there is a kernel.
        dtypes: Those that the kernels take, by platform.
    """

    name: str
    program: Callable[..., Program]
    oracle: Oracle
    sizes: Mapping[str, Size]
    differentiated: tuple[int, ...] = ()
    peers: Mapping[str, Program] = dataclasses.field(default_factory=dict)
    targets: frozenset[str] = EVERYWHERE
    dtypes: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: DTYPES
    )

    def expected(
        self, size: Size, arrays: Sequence[Any], cotangent: Any
    ) -> list[np.ndarray]:
        """The result, of the queries compared, and the gradients."""
        wide = lambda x: np.asarray(
            x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None
        )
        some = {"queries": np.array(size.queries)} if size.queries else {}
        return self.oracle(
            list(map(wide, arrays)), wide(cotangent), **size.options, **some
        )


def with_gradients(program: Program, positions: tuple[int, ...]) -> Program:
    """The function of a cotangent and the arrays: the result, then the gradients."""

    def both(cotangent: Any, *arrays: Any) -> Any:
        def of_some(*some: Any) -> Any:
            every = list(arrays)
            for position, array in zip(positions, some, strict=True):
                every[position] = array
            return program(*every)

        value, pull = jax.vjp(of_some, *(arrays[i] for i in positions))
        return value, *pull(cotangent)

    return both
