"""Every public function runs where JAX refuses to promote dtypes by itself."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import example_calls, public_names
from tests.example_calls import FUNCTIONS, Call

# Why a function cannot be called here, or not with other dtypes than in its example.
NOT_AT_ALL = {
    "softlib.explain": "gives names, and no arrays",
    "softlib.attention.sequence_parallel_attention": "runs inside jax.shard_map",
}
NOT_MIXED = {
    "softlib.optim.projected_gradient_ascent": "its objective mixes dtypes itself",
}
NOT_REVERSED = {
    "softlib.decoding.beam_search",  # their loops end when all sequences have
    "softlib.decoding.generate",
    "softlib.decoding.speculative_generate",
    "softlib.estimation.fit_annealing_law",  # and those that fit
    "softlib.estimation.fit_exponential_family",
    "softlib.estimation.fit_gaussian_experts",  # loops until it has converged
    "softlib.estimation.fit_gaussian_mixture",
    "softlib.estimation.fit_logistic_regression",
    "softlib.estimation.fit_separator",
    "softlib.estimation.fit_softmax_regression",
}
CALLABLE = [name for name in FUNCTIONS if name.address not in NOT_AT_ALL]
# Options that many functions share, with the dtypes in which they are tried.
OPTIONS = {
    "where": bool,
    "class_where": bool,
    "label_where": bool,
    "bias": jnp.bfloat16,
    "class_weights": jnp.bfloat16,
    "label_weights": jnp.bfloat16,
    "scale": jnp.bfloat16,
    "temperature": jnp.bfloat16,
    "weights": jnp.bfloat16,
    "excluded_labels": jnp.int32,
    "mask": bool,
    "label_smoothing": jnp.bfloat16,
    "logsumexp_penalty": jnp.bfloat16,
}


def trace(call: Call, *, reverse: bool = True) -> None:
    """The call and its derivative by everything that is floating, nothing computed."""
    function, arrays = call.split()
    is_floating = [example_calls.is_floating(array) for array in arrays]
    floating = [a for a, yes in zip(arrays, is_floating, strict=True) if yes]

    def of_floating(floating: list[Any]) -> list[Any]:
        rest = iter(floating)
        pairs = zip(arrays, is_floating, strict=True)
        found = function([next(rest) if yes else array for array, yes in pairs])
        return list(filter(example_calls.is_floating, found)) if reverse else found

    def with_derivative(floating: list[Any]) -> Any:
        found, pull = jax.vjp(of_floating, floating)
        return pull(found)

    jax.eval_shape(with_derivative if reverse and floating else of_floating, floating)


def trace_as_possible(name: public_names.PublicName, call: Call) -> None:
    trace(call, reverse=name.address not in NOT_REVERSED)


@pytest.mark.parametrize("name", CALLABLE, ids=lambda name: name.address)
def test_calls_of_one_dtype(name: public_names.PublicName):
    call = example_calls.of(name.address)
    with jax.numpy_dtype_promotion("strict"):
        trace_as_possible(name, call)


@pytest.mark.parametrize("name", CALLABLE, ids=lambda name: name.address)
def test_calls_of_several_dtypes(name: public_names.PublicName):
    if name.address in NOT_MIXED:
        return
    call = example_calls.of(name.address)
    with jax.numpy_dtype_promotion("strict"):
        refused_for_promotion(name, call.cast(jnp.bfloat16))
        mixed = call.cast(jnp.bfloat16, jnp.float32, numbers=True)
        refused_for_promotion(name, mixed)
    for option in OPTIONS:  # with the dtypes the other way round
        if option in call.parameters and call.arguments.get(option) is None:
            mixed = call.cast(jnp.float32, jnp.bfloat16)
            with jax.numpy_dtype_promotion("strict"):
                special = option in SPECIAL or f"{name.address}.{option}" in STATIC
                assert special or accepted(name, mixed, option), option


# Shapes of their own, which are not those of another argument; each has its tests.
SPECIAL = {"mask", "bias", "weights"}
STATIC = {
    "softlib.nn.attention_fn.scale",
    "softlib.nn.generalized_gaussian_init.scale",
}


def accepted(name: public_names.PublicName, call: Call, option: str) -> bool:
    """Whether the option was taken in one of the shapes that it may have."""
    return any(
        not refused_for_promotion(
            name, call.replaced(**{option: jnp.ones(shape, OPTIONS[option])})
        )
        for shape in shapes(call)
    )


def refused_for_promotion(name: public_names.PublicName, call: Call) -> bool:
    """Whether the call is refused, which must not be for its mix of dtypes."""
    try:
        trace_as_possible(name, call)
    except Exception as error:
        if "dtype promotion" in str(error):
            raise
        return True
    return False


def shapes(call: Call) -> Iterator[tuple[int, ...]]:
    """Of the arrays, of their rows, of their last axis, and of a scalar."""
    leaves = filter(example_calls.is_array, jax.tree.leaves(call.arguments))
    own = [np.shape(leaf) for leaf in leaves]
    cuts = [slice(None), slice(-1), slice(-1, None), slice(1), slice(2), slice(-2)]
    found = (shape[cut] for shape, cut in itertools.product(own, cuts))
    return iter(dict.fromkeys((*found, ())))


def test_it_is_strict_here():
    add = lambda x, y: x + y
    mixed = Call.of(add, jnp.ones(2), jnp.ones(2)).cast(jnp.bfloat16, jnp.float32)
    with jax.numpy_dtype_promotion("strict"), pytest.raises(ValueError, match="prom"):
        trace(mixed)
