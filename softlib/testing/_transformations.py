"""One function through every transformation of JAX that its users may apply."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from ._assert_close import assert_close


def check_transformations(
    function: Callable[..., Any],
    *arrays: Any,
    rows: Sequence[int] = (0,),
    differentiable: Sequence[int] | None = None,
    skip: Mapping[str, str] | None = None,
    length: int | None = None,
    c: float = 8.0,
) -> None:
    r"""Fails unless `function` means the same under every transformation of JAX.

    The checks, by the names in `TRANSFORMATIONS`; "result" is the outputs together
    with the gradients of a fixed random combination of the floating outputs:

    - `jit`: the compiled result is the eager one.
    - `vmap`: batching the row arguments, the other arguments, or all of them gives the
      results of a loop.
    - `reverse_mode`, `forward_mode`: first derivatives against finite differences.
    - `gradient_of_gradient`: reverse over reverse, also with respect to the cotangent.
    - `hessian_vector_product`: forward over reverse, against finite differences of the
      gradient.
    - `checkpoint`: `jax.checkpoint` changes no result.
    - `shard_map`: the rows divided over the devices, for Auto and Explicit meshes and
      for `check_vma` on and off; differentiated outside of `shard_map` and inside.
    - `sharded_jit`: plain `jax.jit` of arrays whose rows are divided, for an Explicit
      mesh and for an Auto one, in context (`jax.set_mesh`) or not.
    - `determinism`: two runs are equal to the last bit.

    Derivatives are checked in float64 (inside `jax.enable_x64`), all else in the dtypes
    given. Choose a point at which `function` is smooth, and fix every option with a
    lambda or `functools.partial`.

    Args:
        function: Takes the arrays by position and returns a pytree of arrays. Boolean
            and integer outputs are compared exactly and have no derivative.
        arrays: Small arrays (the eager run is slow); a few rows and odd sizes find more
            than large ones.
        rows: Positions of the arguments with one entry per row on their leading axis.
            Every output must then have the rows on its leading axis too; where it does
            not, skip `shard_map` with the reason.
        differentiable: Positions of the arguments with a derivative. None means every
            floating argument.
        skip: Name of a check to its reason, in words: `{"forward_mode": "the function
            has a custom_vjp"}`.
        length: Terms of the longest sum, for the tolerance. None means the size of the
            largest argument.
        c: Factor of the tolerance, see `assert_close`. It is twice the default there
            because both sides are rounded.

    Raises:
        AssertionError: One or more checks fail; the message has a line for each.
        ValueError: A position is out of range, a name in `skip` is unknown or has no
            reason, the rows differ in number or cannot be divided over devices.
        TypeError: A differentiable argument is not floating.

    Derivatives: none; the result is None.
    Cost: about twenty compilations of `function` or its gradient, seconds to a minute.
    Source: softlib's own.

    Example:
        >>> x = jnp.linspace(-1.0, 1.0, 8)
        >>> check_transformations(jnp.tanh, x)
        >>> try:
        ...     check_transformations(lambda x: x * jax.lax.stop_gradient(x), x)
        ... except AssertionError as error:
        ...     print("reverse_mode" in str(error))
        True
    """
    skip = {} if skip is None else skip
    for name, reason in skip.items():
        if name not in _CHECKS:
            raise ValueError(
                "check_transformations: `skip` must name checks among "
                f"{', '.join(TRANSFORMATIONS)}, got {name!r}."
            )
        if not reason.strip():
            raise ValueError(
                "check_transformations: `skip` must give a reason for every check, got "
                f"{reason!r} for {name!r}."
            )
    arrays = tuple(jnp.asarray(a) for a in arrays)
    if differentiable is None:
        differentiable = [i for i, a in enumerate(arrays) if _is_floating(a)]
    for name, positions in (("rows", rows), ("differentiable", differentiable)):
        for i in positions:
            if not 0 <= i < len(arrays):
                raise ValueError(
                    f"check_transformations: `{name}` must hold positions in "
                    f"[0, {len(arrays)}), got {i}."
                )
    for i in differentiable:
        if not _is_floating(arrays[i]):
            raise TypeError(
                "check_transformations: `differentiable` must name floating arrays, "
                f"got position {i} with {arrays[i].dtype}."
            )
    counts = {arrays[i].shape[:1] for i in rows}
    if len(counts) > 1 or () in counts:
        raise ValueError(
            "check_transformations: `rows` must name arrays with equal leading axes, "
            f"got shapes {[arrays[i].shape for i in rows]}."
        )

    if not rows and not {"shard_map", "sharded_jit"} <= skip.keys():
        raise ValueError(
            "check_transformations: `rows` must name an argument unless `shard_map` "
            "and `sharded_jit` are skipped, got ()."
        )
    if rows and len(jax.devices()) > 1 == _parts(arrays[rows[0]].shape[0]):
        raise ValueError(
            "check_transformations: `rows` must name arrays whose number of rows can "
            f"be divided over some of the {len(jax.devices())} devices, got "
            f"{arrays[rows[0]].shape[0]} rows."
        )

    if length is None:
        length = max((a.size for a in arrays), default=1)
    subject = _Subject(
        function, arrays, tuple(rows), tuple(differentiable), length, float(c)
    )
    failures: list[str] = []
    first: Exception | None = None
    for name, check in _CHECKS.items():
        if name in skip:
            continue
        try:
            check(subject)
        # Whatever the function raises under a transformation is that check's failure.
        except Exception as error:
            first = error if first is None else first
            failures.append(f"`{name}`: {type(error).__name__}: {error}")
    if failures:
        raise AssertionError("check_transformations: " + "\n".join(failures)) from first


def _is_floating(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


@dataclass(frozen=True)
class _Subject:
    """The function with its arguments, seen as arrays -> (outputs, gradients)."""

    function: Callable[..., Any]
    arrays: tuple[Array, ...]
    rows: tuple[int, ...]
    differentiable: tuple[int, ...]
    length: int
    c: float

    def leaves(self, *arrays):
        return [jnp.asarray(leaf) for leaf in jax.tree.leaves(self.function(*arrays))]

    def floating(self, arrays, chosen):
        """The floating outputs as a function of the differentiable arguments."""
        arrays = list(arrays)
        for i, array in zip(self.differentiable, chosen, strict=True):
            arrays[i] = array
        leaves = self.leaves(*arrays)
        return [leaf for leaf in leaves if _is_floating(leaf)], leaves

    def result(self, cotangents, *arrays):
        """All outputs, and the gradients for `cotangents` of the floating ones."""
        chosen = [arrays[i] for i in self.differentiable]
        if not (chosen and cotangents):
            return self.leaves(*arrays), []
        call = functools.partial(self.floating, arrays)
        _, pullback, outputs = jax.vjp(call, chosen, has_aux=True)
        (gradients,) = pullback(cotangents)
        return outputs, gradients

    def cotangents(self):
        shapes = jax.eval_shape(self.leaves, *self.arrays)
        random = np.random.default_rng(0)
        # Of NumPy, here and below: an operation on one array alone is a compilation.
        return [
            jax.device_put(np.asarray(random.uniform(0.5, 1.5, s.shape), s.dtype))
            for s in shapes
            if _is_floating(s)
        ]

    @functools.cached_property
    def expected(self):
        return jax.device_get(self.compute(self.cotangents(), *self.arrays))

    @functools.cached_property
    def in_float64(self):
        with jax.enable_x64():
            return _InFloat64(self)

    @functools.cached_property
    def compute(self):
        return jax.jit(self.result)

    def compare(self, actual, expected):
        actual, expected = map(jax.tree.leaves, jax.device_get((actual, expected)))
        for one, two in zip(actual, expected, strict=True):
            if one.dtype != two.dtype:
                raise AssertionError(f"dtypes differ, {one.dtype} and {two.dtype}")
            if _is_floating(one):
                assert_close(one, two, dtype=one.dtype, length=self.length, c=self.c)
            else:
                np.testing.assert_array_equal(one, two)


# ------------------------------------------------------------------ compile and batch
def _check_jit(subject: _Subject) -> None:
    # Differentiated arrays are tracers too, so the values are computed once without.
    subject.compare(subject.expected[0], subject.leaves(*subject.arrays))
    eager = subject.result(subject.cotangents(), *subject.arrays)
    subject.compare(subject.expected, eager)


def _check_vmap(subject: _Subject) -> None:
    everything = tuple(range(len(subject.arrays)))
    others = tuple(i for i in everything if i not in subject.rows)
    cotangents = subject.cotangents()
    for batched in dict.fromkeys((subject.rows, others, everything)):
        if not batched:
            continue
        versions = [
            [
                _version(a, k) if i in batched else a
                for i, a in enumerate(subject.arrays)
            ]
            for k in range(3)
        ]
        axes = [0 if i in batched else None for i in everything]
        stacked = [
            np.stack(several) if axis == 0 else several[0]
            for axis, several in zip(axes, zip(*versions, strict=True), strict=True)
        ]
        call = jax.jit(jax.vmap(subject.result, (None, *axes)))
        actual = jax.device_get(call(cotangents, *stacked))
        for k, arrays in enumerate(versions):
            one = jax.tree.map(lambda a, k=k: a[k], actual)
            subject.compare(one, subject.compute(cotangents, *arrays))


def _version(array: Array, k: int) -> np.ndarray:
    """The k-th of several different arrays that are as admissible as `array`."""
    one = np.asarray(array)
    if one.ndim:
        return np.roll(one, k, axis=0)
    return np.asarray(one * (1 + k / 8), one.dtype) if _is_floating(one) else one


def _check_determinism(subject: _Subject) -> None:
    first = subject.compute(subject.cotangents(), *subject.arrays)
    second = subject.compute(subject.cotangents(), *subject.arrays)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if np.asarray(one).tobytes() != np.asarray(two).tobytes():
            raise AssertionError("two runs on the same arrays differ")


def _check_checkpoint(subject: _Subject) -> None:
    again = _replace(subject, jax.checkpoint(subject.function))
    subject.compare(again.expected, subject.expected)


def _replace(subject: _Subject, function: Callable[..., Any]) -> _Subject:
    return _Subject(
        function,
        subject.arrays,
        subject.rows,
        subject.differentiable,
        subject.length,
        subject.c,
    )


# ---------------------------------------------------------------- derivatives, float64
class _InFloat64:
    """A subject's floating outputs and their gradients, in float64, as two programs."""

    def __init__(self, subject: _Subject):
        arrays = [
            jax.device_put(
                np.asarray(a, np.float64) if _is_floating(a) else np.asarray(a)
            )
            for a in subject.arrays
        ]
        self.chosen = [arrays[i] for i in subject.differentiable]
        self.outputs = jax.jit(lambda chosen: subject.floating(arrays, chosen)[0])
        random = np.random.default_rng(1)
        self.cotangents = [
            random.uniform(0.5, 1.5, s.shape)
            for s in jax.eval_shape(self.outputs, self.chosen)
        ]
        self.outputs_and_gradient = jax.jit(functools.partial(_pulled, self.outputs))
        self.gradient = lambda x, g: self.outputs_and_gradient(g, x)[1][0]

    @property
    def is_differentiable(self) -> bool:
        return bool(self.chosen and self.cotangents)


def _pulled(function, cotangents, *point):
    values, pull = jax.vjp(function, *point)
    return values, pull(cotangents)


def _check_reverse_mode(subject: _Subject) -> None:
    with jax.enable_x64():
        wide = subject.in_float64
        if wide.is_differentiable:
            pulled = wide.outputs_and_gradient
            _compare_reverse(wide.outputs, pulled, (wide.chosen,))


def _check_forward_mode(subject: _Subject) -> None:
    with jax.enable_x64():
        wide = subject.in_float64
        if wide.is_differentiable:
            _compare_forward(wide.outputs, (wide.chosen,))


def _check_gradient_of_gradient(subject: _Subject) -> None:
    with jax.enable_x64():
        wide = subject.in_float64
        if wide.is_differentiable:
            pulled = jax.jit(functools.partial(_pulled, wide.gradient))
            _compare_reverse(wide.gradient, pulled, (wide.chosen, wide.cotangents))


def _check_hessian_vector_product(subject: _Subject) -> None:
    with jax.enable_x64():
        wide = subject.in_float64
        if wide.is_differentiable:
            _compare_forward(wide.gradient, (wide.chosen, wide.cotangents))


def _compare_reverse(function, pulled, point) -> None:
    """The pulled back cotangent along a direction, and the difference quotient."""
    values = jax.device_get(function(*point))
    random = np.random.default_rng(2)
    tangents, cotangents = _normal(random, point), _normal(random, values)
    found, gradients = jax.device_get(pulled(cotangents, *point))
    jax.tree.map(_compare_with_differences, found, values)
    quotient = _difference_quotient(function, point, tangents)
    _compare_with_differences(_dot(gradients, tangents), _dot(quotient, cotangents))


def _compare_forward(function, point) -> None:
    tangents = _normal(np.random.default_rng(2), point)
    both = jax.jit(lambda point, tangents: jax.jvp(function, point, tangents))
    found, slopes = jax.device_get(both(point, tangents))
    jax.tree.map(_compare_with_differences, found, jax.device_get(function(*point)))
    quotient = _difference_quotient(function, point, tangents)
    jax.tree.map(_compare_with_differences, slopes, quotient)


def _difference_quotient(function, point, tangents, step=2e-5):
    """The slope along the tangents, by differences of both sides.

    Richardson's extrapolation of two steps removes the error of second order, which a
    strongly curved function would be blamed for.
    """
    here = jax.device_get(point)
    moved = lambda s: jax.tree.map(lambda x, t: x + s * t, here, tangents)
    # Equal infinities have no difference.
    slope = lambda s: lambda x, y: np.where(x == y, 0.0, x - y) / (2 * s)

    def central(s):
        above, below = (jax.device_get(function(*moved(t))) for t in (s, -s))
        return jax.tree.map(slope(s), above, below)

    extrapolated = lambda half, whole: (4 * half - whole) / 3
    return jax.tree.map(extrapolated, central(step / 2), central(step))


def _normal(random, tree):
    return jax.tree.map(lambda x: random.normal(size=np.shape(x)), tree)


def _dot(one, two):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return sum(np.vdot(x, y) for x, y in leaves)


def _compare_with_differences(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------ many devices
def _mesh(subject: _Subject, axis_type: AxisType):
    """A mesh of as many devices as divide the rows."""
    parts = _parts(subject.arrays[subject.rows[0]].shape[0])
    return jax.make_mesh(
        (parts,), ("rows",), (axis_type,), devices=jax.devices()[:parts]
    )


def _parts(count: int) -> int:
    return max(n for n in range(1, len(jax.devices()) + 1) if count % n == 0)


def _check_shard_map(subject: _Subject) -> None:
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = _mesh(subject, axis_type)
        specs = [P("rows") if i in subject.rows else P() for i in _positions(subject)]
        gradient_specs = [specs[i] for i in subject.differentiable]
        for check_vma in (True, False):
            over_rows = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
            outside = _replace(
                subject,
                over_rows(subject.leaves, in_specs=tuple(specs), out_specs=P("rows")),
            )

            def local(cotangents, *arrays, check_vma=check_vma):
                outputs, gradients = subject.result(cotangents, *arrays)
                if gradients and not check_vma:
                    # Nothing is known to be replicated: the sum over devices is ours.
                    gradients = [
                        g if i in subject.rows else lax.psum(g, "rows")
                        for i, g in zip(subject.differentiable, gradients, strict=True)
                    ]
                return outputs, gradients

            inside = over_rows(
                local,
                in_specs=(P("rows"), *specs),
                out_specs=(P("rows"), gradient_specs if _has_gradient(subject) else []),
            )
            with jax.set_mesh(mesh):
                arguments = _placed(subject, mesh)
                both = jax.jit(lambda *a, o=outside, i=inside: (o.result(*a), i(*a)))
                for actual in jax.device_get(both(*arguments)):
                    subject.compare(actual, subject.expected)


def _check_sharded_jit(subject: _Subject) -> None:
    expected = subject.expected
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = _mesh(subject, axis_type)
        with jax.set_mesh(mesh):
            # Not `subject.compute`: its cache may hold a trace without this mesh.
            actual = jax.jit(subject.result)(*_placed(subject, mesh))
            subject.compare(jax.device_get(actual), expected)
        if axis_type == AxisType.Auto:
            actual = jax.jit(subject.result)(*_placed(subject, mesh))
            subject.compare(jax.device_get(actual), expected)


def _positions(subject: _Subject) -> range:
    return range(len(subject.arrays))


def _has_gradient(subject: _Subject) -> bool:
    return bool(subject.differentiable and subject.cotangents())


def _placed(subject: _Subject, mesh):
    """Cotangents and arguments on the mesh: rows divided, the rest everywhere."""
    count = subject.arrays[subject.rows[0]].shape[0]
    divided, everywhere = NamedSharding(mesh, P("rows")), NamedSharding(mesh, P())
    cotangents = [
        jax.device_put(g, divided if g.shape[:1] == (count,) else everywhere)
        for g in subject.cotangents()
    ]
    arrays = [
        jax.device_put(a, divided if i in subject.rows else everywhere)
        for i, a in enumerate(subject.arrays)
    ]
    return (cotangents, *arrays)


_CHECKS: dict[str, Callable[[_Subject], None]] = {
    "jit": _check_jit,
    "vmap": _check_vmap,
    "reverse_mode": _check_reverse_mode,
    "forward_mode": _check_forward_mode,
    "gradient_of_gradient": _check_gradient_of_gradient,
    "hessian_vector_product": _check_hessian_vector_product,
    "checkpoint": _check_checkpoint,
    "shard_map": _check_shard_map,
    "sharded_jit": _check_sharded_jit,
    "determinism": _check_determinism,
}

TRANSFORMATIONS = tuple(_CHECKS)
