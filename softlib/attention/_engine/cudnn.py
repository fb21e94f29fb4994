"""Attention by cuDNN, called through `jax.nn`, behind the operations of attention.

For its own derivative `jax.nn` keeps the logsumexp of each row, as the engine does, but
what it returns is rounded to 16 bits. So both passes come from its derivative: the
forward pass returns what that keeps, and of the traced backward pass the call that
would compute it again is left out.

What cuDNN gives in rows without keys is not specified: they are selected away, in the
results and in the cotangents.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _devices
from softlib import _kernel_limits as limits
from softlib._dispatch import Implementation, asks_about_a_device
from softlib.masks import All, Causal, Padding, Window

from .scores import Result, Softmax
from .stream import BackwardOperands, Gradient
from .tiles import OWN_BLOCKS, Operands, Options, why_other_dtypes

# Smaller problems are few programs in plain JAX too.
LEAST_LENGTH = 128
MOST_FEATURES, MOST_FEATURES_HOPPER = 128, 256
LEAST_CAPABILITY = 8
# A logsumexp that gives every key the weight 0; finite in base 2 as well.
_NO_WEIGHT = 1e30

type Lengths = Int[Array, " B"] | None


class Band(NamedTuple):
    """The keys of a query: `-left <= key - query <= right`, None for no limit."""

    left: int | None = None
    right: int | None = None


class Call(NamedTuple):
    """The static arguments of cuDNN's attention."""

    scale: float
    is_causal: bool
    left: int | None

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        query_lengths: Lengths,
        key_lengths: Lengths,
    ) -> Array:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=self.scale,
            is_causal=self.is_causal,
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_lengths,
            local_window_size=None if self.left is None else (self.left, 0),
            implementation="cudnn",
        )


def forward_pass(
    call: Call, query: Array, key: Array, value: Array, *lengths: Lengths
) -> tuple[Array, Float[Array, "B N T"]]:
    """The output, and the logsumexp that its derivative keeps."""
    attend = lambda *arrays: call(*arrays, *lengths)
    out, pull = jax.vjp(attend, query, key, value)
    (lse,) = (x for x in jax.tree.leaves(pull) if x.dtype == jnp.float32)
    return out, lse


def backward_pass(
    call: Call,
    query: Array,
    key: Array,
    value: Array,
    query_lengths: Lengths,
    key_lengths: Lengths,
    out: Array,
    lse: Float[Array, "B N T"],
    cotangent: Array,
) -> tuple[Array, Array, Array]:
    """The cotangents of query, key and value, from the results of the forward pass."""

    def both_passes(query, key, value, query_lengths, key_lengths, cotangent):
        attend = lambda q, k, v: call(q, k, v, query_lengths, key_lengths)
        _, pull = jax.vjp(attend, query, key, value)
        return pull(cotangent)

    arguments = query, key, value, query_lengths, key_lengths, cotangent
    program = jax.make_jaxpr(both_passes)(*arguments)
    dq, dk, dv = _run(program, jax.tree.leaves(arguments), (out, lse))
    return dq, dk, dv


def _run(program: Any, arguments: list[Array], known: tuple[Array, ...]) -> list[Array]:
    """Runs a traced program without the equation that would compute `known`."""
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)
    read = lambda x: x.val if isinstance(x, Literal) else values[x]
    types = lambda xs: [(x.shape, x.dtype) for x in xs]
    left_out = 0
    for equation in jaxpr.eqns:
        if types(x.aval for x in equation.outvars) == types(known):
            left_out += 1
            results = known
        else:
            given = map(read, equation.invars)
            results = equation.primitive.bind(*given, **equation.params)
            if not equation.primitive.multiple_results:
                results = [results]
        values |= zip(equation.outvars, results, strict=True)
    assert left_out == 1, f"jax.nn's derivative has {left_out} forward passes"
    return list(map(read, jaxpr.outvars))


def _by_batch(function: Callable[..., Any], call: Call) -> Callable[..., Any]:
    """`function(call, ...)` for arrays with a batch axis, which takes in those of vmap.

    `jax.nn` has a rule for mapped first axes only.
    """
    batched = jax.custom_batching.custom_vmap(functools.partial(function, call))

    @batched.def_vmap
    def _(size: int, mapped: Any, *arrays: Array | None) -> Any:
        def joined(array: Array, is_mapped: bool) -> Array:
            if not is_mapped:
                array = jnp.broadcast_to(array[None], (size, *array.shape))
            return array.reshape(size * array.shape[1], *array.shape[2:])

        def apart(array: Array) -> Array:
            return array.reshape(size, array.shape[0] // size, *array.shape[1:])

        found = batched(*jax.tree.map(joined, list(arrays), list(mapped)))
        found = jax.tree.map(apart, found)
        return found, jax.tree.map(lambda _: True, found)

    return batched


def _forward(options: Options, operands: Operands) -> Result:
    call, lengths = _call_of(options, operands), _lengths_of(operands)
    query, key, value = _arrays(operands)
    out, lse = _by_batch(forward_pass, call)(query, key, value, *lengths)
    found = Result(out, jnp.moveaxis(lse, 1, 2))
    attends = _attending(call, operands, lengths)
    if attends is not None:
        out = jnp.where(attends[..., None], found.out, 0)
        found = Result(out, jnp.where(attends, found.normalizer, -jnp.inf))
    return found


def _backward(options: Options, given: BackwardOperands) -> Gradient:
    operands, out, cotangent = given.operands, given.out, given.out_cotangent
    assert out is not None
    assert cotangent is not None
    call, lengths = _call_of(options, operands), _lengths_of(operands)
    query, key, value = _arrays(operands)
    attends = _attending(call, operands, lengths)
    lse = given.normalizer
    if attends is not None:
        cotangent = jnp.where(attends[..., None], cotangent, 0)
        lse = jnp.where(attends, lse, _NO_WEIGHT)
    lse = jnp.moveaxis(lse, 2, 1)
    arrays = query, key, value, *lengths, out, lse, cotangent
    dq, dk, dv = _by_batch(backward_pass, call)(*arrays)
    if attends is not None:
        dq = jnp.where(attends[..., None], dq, 0)
    if lengths[1] is not None:
        real = jnp.arange(key.shape[1])[None] < lengths[1][:, None]
        real = real[..., None, None]
        dk, dv = jnp.where(real, dk, 0), jnp.where(real, dv, 0)
    return Gradient(dq, dk, dv, None, None, ())


def _arrays(operands: Operands) -> tuple[Array, Array, Array]:
    assert operands.value is not None
    return operands.query, operands.key, operands.value


def _attending(
    call: Call, operands: Operands, lengths: tuple[Lengths, Lengths]
) -> Bool[Array, "B T 1"] | None:
    """The queries that have a key; None if all have."""
    query_lengths, key_lengths = lengths
    if key_lengths is None or query_lengths is None:
        return None
    query = jnp.arange(operands.query.shape[1])[None]
    first = 0 * query if call.left is None else jnp.maximum(query - call.left, 0)
    has_key = first < key_lengths[:, None]
    return (has_key & (query < query_lengths[:, None]))[..., None]


def _call_of(options: Options, operands: Operands) -> Call:
    band = _band(operands)
    assert band is not None
    return Call(options.scale, band.right == 0, band.left)


def _lengths_of(operands: Operands) -> tuple[Lengths, Lengths]:
    """Numbers of real queries and keys per batch entry; None without a `Padding`."""
    padding = [
        part for part in operands.plan.mask._parts() if isinstance(part, Padding)
    ]
    if not padding:
        return None, None
    batch = operands.query.shape[0]

    def least(longest: int, given: list[Any]) -> Array:
        found = jnp.full((batch,), longest, jnp.int32)
        for each in given:
            clipped = jnp.clip(jnp.asarray(each), 0, longest).astype(jnp.int32)
            found = jnp.minimum(found, jnp.broadcast_to(clipped, (batch,)))
        return found

    query_length, key_length = operands.plan.lengths
    queries = [part.query for part in padding if part.query is not None]
    keys = [part.key for part in padding if part.key is not None]
    return least(query_length, queries), least(key_length, keys)


def _band(operands: Operands) -> Band | None:
    """The band that the mask is besides lengths; None if it is none."""
    query_length, key_length = operands.plan.lengths
    limits: dict[str, list[int]] = {"left": [], "right": []}
    for part in operands.plan.mask._parts():
        if isinstance(part, Causal):
            limits["right"].append(part.offset)
        elif isinstance(part, Window):
            limits["left"] += [] if part.left is None else [part.left]
            limits["right"] += [] if part.right is None else [part.right]
        elif not isinstance(part, All | Padding):
            return None
    # A limit that no pair exceeds is none.
    left, right = min(limits["left"], default=None), min(limits["right"], default=None)
    return Band(
        None if left is None or left >= query_length - 1 else left,
        None if right is None or right >= key_length - 1 else right,
    )


def _why_not(options: Options, operands: Operands) -> str | None:
    return (
        _why_no_option(options, operands)
        or why_other_dtypes(options, operands)
        or _why_no_shape(operands)
        or _why_no_mask(operands)
        or _why_no_device()
        or _why_refused(options, operands)
    )


def _backward_why_not(options: Options, given: BackwardOperands) -> str | None:
    if options.wide_gradients:
        return "gradients are to be float32, it rounds them to the dtype of the arrays"
    if not options.drops_normalizer:
        return "it has no gradient through the logsumexp"
    return _why_not(options, given.operands)


def _why_no_option(options: Options, operands: Operands) -> str | None:
    if operands.value is None:
        return "it computes no statistics without values"
    if options.kind != Softmax():
        return f"it has no weights of kind {type(options.kind).__name__}"
    if options.softcap is not None:
        return "it has no softcap"
    if operands.sinks is not None:
        return "it takes no sinks"
    if operands.bias is not None:
        return "it takes no bias"
    if operands.dense is not None:
        return "it takes no boolean array as a mask"
    if options.has_given_blocks:
        return OWN_BLOCKS
    return None


def _why_no_shape(operands: Operands) -> str | None:
    query, _, value = _arrays(operands)
    if 0 in query.shape:
        return "an axis is empty"
    sizes = (
        ("queries", operands.plan.lengths[0], LEAST_LENGTH),
        ("keys", operands.plan.lengths[1], LEAST_LENGTH),
    )
    reason = limits.why_too_small(sizes)
    if reason is not None:
        return reason
    features = query.shape[-1]
    if value.shape[-1] != features:
        return f"values have {value.shape[-1]} features, queries {features}"
    is_hopper = _devices.gpu_generation() == "hopper"
    most = MOST_FEATURES_HOPPER if is_hopper else MOST_FEATURES
    if features % 8 or features > most:
        return f"{features} features are not a multiple of 8 up to {most}"
    return None


def _why_no_mask(operands: Operands) -> str | None:
    band, (query_length, key_length) = _band(operands), operands.plan.lengths
    if band is None or band.right not in (None, 0):
        return (
            "its masks are causal from the first query and key on, or lengths, not "
            f"{operands.plan.mask!r}"
        )
    if band.left is not None and band.right is None:
        return "its windows are causal"
    if band.left is not None and query_length > key_length:
        return f"in a window {query_length} queries are more than {key_length} keys"
    return None


def _why_no_device() -> str | None:
    """The reason against this machine's GPU, if the program is for this machine."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return None
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    major = re.match(r"(\d+)\.\d+$", capability)
    if major is None or int(major[1]) >= LEAST_CAPABILITY:
        return None
    return f"it needs compute capability {LEAST_CAPABILITY}.0, this is {capability}"


def _why_refused(options: Options, operands: Operands) -> str | None:
    """The reason of `jax.nn` against the call on this machine.

    It asks for the cuDNN and the GPU of this machine, which say nothing about another.
    """
    if asks_about_a_device():
        return None
    call = _call_of(options, operands)
    query, key, value = (
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _arrays(operands)
    )
    lengths = None
    if any(isinstance(part, Padding) for part in operands.plan.mask._parts()):
        lengths = jax.ShapeDtypeStruct(query.shape[:1], jnp.int32)
    arguments = query, key, value, lengths, lengths
    try:
        jax.eval_shape(functools.partial(forward_pass, call), *arguments)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error).rstrip(".")
    return None


FORWARD = Implementation("cudnn", _forward, _why_not, platform="cuda")
BACKWARD = Implementation("cudnn", _backward, _backward_why_not, platform="cuda")
