"""Programs exported with a batch of any size, by `jax.export` with symbolic shapes."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from softlib import attention, losses, masks, softmax
from softlib._symbolic import has_symbolic_shape, is_symbolic
from tests import example_calls, public_names
from tests.example_calls import FUNCTIONS, Call
from tests.heads import of_head, of_stored

# Annotations ask for sizes that are Python integers.
pytestmark = pytest.mark.usefixtures("untyped")

f32, i32 = jnp.float32, jnp.int32

# Results and gradients, with the shapes of their arguments: "b" is the batch.
type Shape = tuple[tuple[Any, ...], Any]
PROGRAMS: dict[str, tuple[Callable[..., Any], list[Shape]]] = {
    "softmax": (softmax.softmax, [(("b", 16), f32)]),
    "log_softmax": (softmax.log_softmax, [(("b", 16), f32)]),
    "logsumexp": (softmax.logsumexp, [(("b", 16), f32)]),
    "two_pass_softmax": (softmax.two_pass_softmax, [(("b", 16), f32)]),
    "sparsemax": (softmax.sparsemax, [(("b", 16), f32)]),
    "top_k_softmax": (
        functools.partial(softmax.top_k_softmax, k=3),
        [(("b", 16), f32)],
    ),
    "softmax_cross_entropy": (
        of_stored.softmax_cross_entropy,
        [(("b", 3, 16), f32), (("b", 3), i32)],
    ),
    "linear_softmax_cross_entropy": (
        losses.linear_softmax_cross_entropy,
        [(("b", 3, 8), f32), ((1100, 8), f32), (("b", 3), i32)],
    ),
    "linear_softmax_cross_entropy_sum": (
        of_head.softmax_cross_entropy_sum,
        [(("b", 8), f32), ((600, 8), f32), (("b",), i32)],
    ),
    "linear_entropy": (
        of_head.entropy,
        [(("b", 8), f32), ((16, 8), f32)],
    ),
    "dot_product_attention": (
        functools.partial(attention.dot_product_attention, is_causal=True),
        [(("b", 6, 4, 8), f32), (("b", 6, 2, 8), f32), (("b", 6, 2, 8), f32)],
    ),
    "attention of blocks": (
        functools.partial(
            attention.dot_product_attention,
            mask=masks.Causal() & masks.Window(9, 0),
            block_query=8,
            block_key=8,
        ),
        [(("b", 24, 2, 4), f32)] * 3,
    ),
    "decode_attention": (
        attention.decode_attention,
        [(("b", 1, 4, 8), f32), (("b", 200, 2, 8), f32), (("b", 200, 2, 8), f32)],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_results_and_gradients_are_those_of_a_direct_call(name: str):
    function, shapes = PROGRAMS[name]
    floating = [i for i, (_, dtype) in enumerate(shapes) if dtype == f32]

    def with_gradients(*arrays: Any) -> Any:
        total = lambda *arrays: jnp.sum(function(*arrays) ** 2)
        return function(*arrays), jax.grad(total, floating)(*arrays)

    program, direct = exported(with_gradients, shapes), jax.jit(with_gradients)
    for size in (1, 5):
        arrays = [array(shape, dtype, size) for shape, dtype in shapes]
        found, expected = program.call(*arrays), direct(*arrays)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def exported(function: Callable[..., Any], shapes: list[Shape]) -> export.Exported:
    (b,) = export.symbolic_shape("b")
    structs = [
        jax.ShapeDtypeStruct([b if n == "b" else n for n in shape], dtype)
        for shape, dtype in shapes
    ]
    return export.export(jax.jit(function))(*structs)


def array(shape: tuple[Any, ...], dtype: Any, size: int) -> jax.Array:
    shape = tuple(size if n == "b" else n for n in shape)
    drawn = np.random.default_rng(len(shape)).normal(size=shape)
    return jnp.asarray(np.abs(10 * drawn) if dtype == i32 else drawn, dtype)


def test_a_number_of_rows_per_step_needs_a_number_of_rows():
    loss = functools.partial(of_head.entropy, token_chunk=2)
    with pytest.raises(ValueError, match=r"`token_chunk` must be None where .* symbol"):
        exported(loss, [(("b", 8), f32), ((16, 8), f32)])


# ------------------------------------------------------------------- every function
# Dimensions of an annotation that stand for any batch axes.
BATCH = re.compile(r"\*(batch|rows|positions|shape)\b|\.\.\.")
# Why a batch of unknown size is refused.
NOT_SYMBOLIC: dict[str, str] = {
    "softlib.scoring.output_rank": "has as many singular values as there are rows or "
    "classes, whichever are fewer",
    "softlib.explain": "gives names, and no arrays",
    "softlib.quantize.fit_codebook": "k-means has to know how many rows it draws from",
    "softlib.attention.sequence_parallel_attention": "runs inside jax.shard_map",
    "softlib.recurrent.linear_recurrence": "scans over its first axis, whose length "
    "XLA's associative scan has to know",
}


def batched(name: public_names.PublicName, size: Any) -> tuple[Call, bool]:
    """The recorded call with one more batch axis on the arrays that may have it."""
    call = example_calls.of(name.address)
    more = False
    arguments = dict(call.arguments)
    for key, parameter in call.parameters.items():
        value: Any = arguments.get(key)
        if not BATCH.search(str(parameter.annotation)):
            continue
        if example_calls.is_array(value) and value.ndim:
            more = True
            shape = (size, *value.shape)
            arguments[key] = jax.ShapeDtypeStruct(shape, value.dtype)
    return call.replaced(**arguments), more


def run(call: Call, transform: Callable[..., Any]) -> Any:
    leaves, structure = jax.tree.flatten(call.arguments)
    is_array = lambda x: isinstance(x, jax.ShapeDtypeStruct)

    def function(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        whole = [next(rest) if is_array(leaf) else leaf for leaf in leaves]
        arguments = jax.tree.unflatten(structure, whole)
        return call(**arguments)

    return transform(function)([leaf for leaf in leaves if is_array(leaf)])


def takes_a_batch(name: public_names.PublicName) -> bool:
    call, more = batched(name, 7)  # a size that no example has
    if not more or name.address in NOT_SYMBOLIC:
        return False
    try:
        run(call, lambda function: functools.partial(jax.eval_shape, function))
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", FUNCTIONS, ids=lambda name: name.address)
def test_a_batch_of_any_size_is_exported(name: public_names.PublicName):
    if takes_a_batch(name):
        call, _ = batched(name, *export.symbolic_shape("b"))
        run(call, lambda function: export.export(jax.jit(function)))


def test_most_functions_of_rows_take_part():
    names = [n for n in FUNCTIONS if n.package in ("softlib.softmax", "softlib.losses")]
    taking = [name.name for name in names if batched(name, 7)[1]]
    assert {"softmax", "entmax", "linear_softmax_cross_entropy"} <= {*taking}
    assert len(taking) > len(names) / 2


def test_symbolic_sizes_are_told_from_numbers():
    b, *_ = export.symbolic_shape("b")
    assert is_symbolic(3, b)
    assert is_symbolic(2 * b + 1)
    assert not is_symbolic(3, 0)
    assert has_symbolic_shape({"x": jax.ShapeDtypeStruct((b, 2), f32), "n": 1})
    assert not has_symbolic_shape([jnp.ones(2), 1, None])
