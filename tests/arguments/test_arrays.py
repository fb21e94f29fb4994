"""Lists, numbers and bools of Python, and NumPy, for the arrays of every function."""

from typing import Any

import jax
import numpy as np
import pytest
from jaxtyping import Array, Bool, Float, Integer

import softlib
from softlib._array_arguments import ArrayKind, argument_kinds, array_arguments
from tests import example_calls, programs
from tests.heads import of_stored
from tests.host import jnp

# What is not in the annotations is what these tests are about.
ANY: Any = softlib
attention, losses, softmax = ANY.attention, ANY.losses, ANY.softmax

NOT_COMPARED = {
    "attention.sequence_parallel_attention": "runs inside jax.shard_map",
    "optim.sgld": "gives functions, and no arrays",
}


def array_names() -> dict[str, list[str]]:
    """The arguments that the signature calls arrays, of each function that has any."""
    kinds = {
        address.removeprefix("softlib."): argument_kinds(function)
        for address, function in example_calls.functions().items()
    }
    names = {
        address: [name for name, kind in of.items() if isinstance(kind, ArrayKind)]
        for address, of in kinds.items()
    }
    return {address: found for address, found in names.items() if found}


def plain(value: Any) -> Any:
    """An array as lists of Python; a key stays what it is."""
    return value.tolist() if is_plain(value) else value


def as_array(value: Any) -> Any:
    return jnp.asarray(value.tolist()) if is_plain(value) else value


def is_plain(value: Any) -> bool:
    return (
        isinstance(value, jax.Array)
        and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        and value.dtype != jnp.uint32
    )


@pytest.mark.parametrize("address", array_names())
def test_lists_are_arrays(address):
    if address in NOT_COMPARED:
        pytest.skip(NOT_COMPARED[address])
    call = example_calls.of(f"softlib.{address}")
    arrays = {n: call.arguments.get(n) for n in array_names()[address]}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    lists = {name: plain(value) for name, value in arrays.items()}
    if all(map(np.ndim, arrays.values())):
        # Made of lists: some of the example are weakly typed, which no list becomes.
        arrays = {name: as_array(value) for name, value in arrays.items()}
        programs.assert_same(lambda: call(**lists), lambda: call(**arrays))
        return
    # A number is no constant of a traced program, where an array is one.
    found, wanted = (jax.tree.leaves(call(**each)) for each in (lists, arrays))
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("address", array_names())
def test_none_is_no_array(address):
    function = example_calls.functions()[f"softlib.{address}"]
    kinds = argument_kinds(function).values()
    found = (kind for kind in kinds if isinstance(kind, ArrayKind))
    required = [kind.name for kind in found if not kind.optional]
    # Known before anything else of the call is looked at.
    others = dict.fromkeys(required, np.zeros(1, "float32"))
    for name in required:
        known = rf"^{function.__name__}: `{name}` must be an array, got None\.$"
        with pytest.raises(TypeError, match=known):
            function(**others | {name: None})


def test_what_is_no_array_is_named():
    for value, kind in (("abc", "str"), ([[1.0], [2.0, 3.0]], "list"), ({}, "dict")):
        with pytest.raises(TypeError, match=f"^softmax: `x` must be .* got {kind}"):
            softmax.softmax(value)


def test_bools_of_python_are_masks(untyped):
    x = [[1.0, 2.0], [0.0, 1.0]]
    np.testing.assert_array_equal(softmax.softmax(x, where=False), np.zeros((2, 2)))
    loss = of_stored.softmax_cross_entropy(x, [0, 1], where=False)
    np.testing.assert_array_equal(loss, [0, 0])
    loads = losses.load_balancing_loss(x, [[0], [1]], where=True)
    np.testing.assert_array_equal(loads, losses.load_balancing_loss(x, [[0], [1]]))
    query = np.ones((1, 2, 1, 2), "float32")
    found = attention.dot_product_attention(query.tolist(), query, query, mask=False)
    np.testing.assert_array_equal(found, np.zeros_like(query))


def test_a_flag_is_true_or_false(untyped):
    logits, labels = jnp.zeros((1, 2)), jnp.zeros(1, int)
    known = r"^softmax_cross_entropy: `return_lse` must be True or False, got 'x'\.$"
    with pytest.raises(TypeError, match=known):
        of_stored.softmax_cross_entropy(logits, labels, return_lse="x")
    lse = of_stored.softmax_cross_entropy(logits, labels, return_lse=np.True_)[1]
    assert lse.shape == (1,)


@pytest.mark.parametrize("names", ["typo", ("xla", "typo")])
def test_an_implementation_has_a_known_name_even_where_none_is_chosen(names):
    known = "^{}: `implementation` must be None or one .* got 'typo'"
    scores, positives = jnp.zeros((1, 3)), jnp.array([[0]])
    with pytest.raises(ValueError, match=known.format("StoredLogits")):
        of_stored.soft_top_k_loss(scores, positives, k=1, implementation=names)
    with pytest.raises(ValueError, match=known.format("linear_softmax_cross_entropy")):
        losses.linear_softmax_cross_entropy(
            jnp.ones((1, 2)), jnp.ones((3, 2)), jnp.array([0]), implementation=names
        )


@array_arguments
def typed(
    x: Float[Array, " n"],
    ids: Integer[Array, " n"] | Float[Array, "n m"] | None = None,
    *,
    where: Bool[Array, "..."] | None = None,
    scale: Float[Array, ""] | float = 1.0,
):
    return x, ids, where, scale


example: Any = typed


def test_only_what_is_annotated_as_arrays_is_converted():
    x, ids, where, scale = example([1.0], ids=[2**40], where=True, scale=2.0)
    assert isinstance(x, jax.Array)
    assert where.dtype == jnp.bool_
    assert type(scale) is float
    assert ids[0] == 2**31 - 1  # out of every range, where 2**40 % 2**32 is 0
    assert example(x)[0] is x
    assert example(x, None)[1] is None
    with pytest.raises(TypeError, match="positional"):
        example(x, ids, where, scale)
