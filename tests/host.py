"""`jax.numpy` whose arrays of given values are made by NumPy.

JAX compiles a program for each shape and dtype of an array that it makes or rearranges
outside of a traced function, some 20 ms each. A test that says `from tests.host import
jnp` has `jnp.asarray`, `jnp.ones`, `jnp.stack` and their like without them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy
import numpy as np
from jax import lax

# Those that neither round nor choose a dtype.
REARRANGING = (
    "abs",
    "broadcast_to",
    "concatenate",
    "flip",
    "full_like",
    "isfinite",
    "isinf",
    "isnan",
    "ones_like",
    "roll",
    "stack",
    "tile",
    "where",
    "zeros_like",
)
# Those whose result has the dtype of all that they are given.
JOINING = ("concatenate", "stack", "where")


def _is_traced() -> bool:
    # A constant of a program is an operation there, and stays one.
    return isinstance(lax.full((), 0), jax.core.Tracer)


def _put(array: Any, dtype: Any = None) -> jax.Array:
    if dtype is not None:
        array = array.astype(jax.dtypes.canonicalize_dtype(dtype))
    return jax.device_put(array)


def _is_number(value: Any) -> bool:
    """Whether it is one of Python, which has a weak type."""
    return isinstance(value, (bool, int, float, complex)) and not isinstance(
        value, np.generic
    )


def _converted(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`jnp.array` or `jnp.asarray` of what is no array of JAX yet."""

    @functools.wraps(theirs)
    def make(array: Any, dtype: Any = None, **options: Any) -> Any:
        is_theirs = options or (_is_number(array) and dtype is None)
        leaves = jax.tree.leaves(array)
        is_theirs = is_theirs or any(isinstance(leaf, jax.Array) for leaf in leaves)
        if is_theirs or _is_traced():
            return theirs(array, dtype, **options)
        # A copy, for the caller may change the array. Large integers stay exact.
        is_exact = dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.integer)
        whole = jax.dtypes.canonicalize_dtype(dtype) if is_exact else None
        return _put(np.array(array, whole), dtype)

    return make


def _made(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A constructor from a shape, a number or a range."""
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def make(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments
        is_theirs = any(isinstance(value, jax.Array) for value in given.values())
        if is_theirs or given.keys() & {"device", "out_sharding"} or _is_traced():
            return theirs(*args, **options)
        dtype = given.pop("dtype", None)
        return _put(ours(**given) if "N" in given else ours(*given.values()), dtype)

    return make


def _rearranged(theirs: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of arrays, of which all or some may be arrays of JAX."""
    ours = getattr(np, name)

    @functools.wraps(theirs)
    def make(*args: Any, **options: Any) -> Any:
        leaves = jax.tree.leaves((args, options))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        if any(
            isinstance(array, jax.core.Tracer) or len(array.devices()) > 1
            for array in arrays
        ):
            return theirs(*args, **options)
        if not arrays or _is_traced():
            return theirs(*args, **options)
        on_host = lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf
        values = ours(*jax.tree.map(on_host, args), **jax.tree.map(on_host, options))
        # NumPy has another idea of a number beside an array of bfloat16.
        joined = jax.tree.leaves(args[name == "where" :]) if name in JOINING else None
        dtype = jax.numpy.result_type(*joined) if joined else None
        return _put(np.array(values), dtype)

    return make


class _Host:
    """The module, but for what makes arrays."""

    def __init__(self):
        for name in ("array", "asarray"):
            setattr(self, name, _converted(getattr(jax.numpy, name)))
        for name in ("arange", "eye", "full", "linspace", "ones", "zeros"):
            setattr(self, name, _made(getattr(jax.numpy, name), getattr(np, name)))
        for name in REARRANGING:
            setattr(self, name, _rearranged(getattr(jax.numpy, name), name))

    def __getattr__(self, name: str) -> Any:
        return getattr(jax.numpy, name)


if TYPE_CHECKING:
    import jax.numpy as jnp
else:
    jnp = _Host()

__all__ = ["jnp"]
