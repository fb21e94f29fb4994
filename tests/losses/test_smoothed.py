"""The smoothed token loss and the mean of the k largest."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import losses, numerics
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.oracles import sequences as oracle

DATA = pathlib.Path(__file__).parent.parent / "data/ethicist_case0.npz"
ROWS, LENGTH = 5, 7
_top_k_mean = jax.jit(numerics.top_k_mean, static_argnames="k")
_smoothed = jax.jit(losses.smoothed_token_loss, static_argnames="num_largest")


def problem(dtype="float64", length=LENGTH):
    random = np.random.default_rng(length)
    nll = jnp.asarray(random.gamma(2, size=(ROWS, length)), dtype)
    where = random.uniform(size=(ROWS, length)) < 0.6
    where[0], where[1], where[2] = True, False, np.arange(length) == 0
    return nll, where


def with_gradient(function, *arrays):
    total = lambda *arrays: (function(*arrays).sum(), function(*arrays))
    gradient, value = jax.jit(jax.grad(total, has_aux=True))(*arrays)
    return value, gradient


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_matches_oracle(dtype, k):
    """Values and gradients; what `where` drops is NaN."""
    with jax.enable_x64(dtype == "float64"):
        nll, where = problem(dtype)
        exact = np.asarray(nll, np.float64)
        wanted = [oracle.smoothed(exact[b], k, 0.7, where[b]) for b in range(ROWS)]
        loss, gradient = with_gradient(
            lambda nll: losses.smoothed_token_loss(
                nll, num_largest=k, alpha=0.7, where=jnp.asarray(where)
            ),
            jnp.where(where, nll, jnp.nan),
        )
        computed = jnp.promote_types(dtype, jnp.float32)
        assert loss.dtype == computed
        assert gradient.dtype == nll.dtype
        assert_close(loss, [w[0] for w in wanted], dtype=computed, length=LENGTH)
        assert_close(gradient, np.stack([w[1] for w in wanted]), dtype=dtype, length=2)


def test_matches_independent_vectors():
    with jax.enable_x64():
        data = {name: jnp.asarray(array) for name, array in np.load(DATA).items()}
        call = lambda nll: losses.smoothed_token_loss(
            nll,
            num_largest=int(data["in_num_largest"]),
            alpha=data["in_alpha"],
            where=data["in_where"],
        )
        loss, gradient = with_gradient(call, data["in_nll"])
        assert_close(loss, data["out_loss"], dtype="float64", length=12)
        assert_close(gradient, data["out_grad_nll"], dtype="float64", length=12)


@pytest.mark.parametrize("length", [0, 1, 2, 31])
def test_every_length(length):
    values, where = problem("float32", length)
    for k in (1, 2, 40):
        found = _top_k_mean(values, k=k, where=jnp.asarray(where))
        exact = np.asarray(values, np.float64)
        wanted = [oracle.top_k_mean(exact[b][where[b]], k) for b in range(ROWS)]
        assert_close(found, wanted, dtype="float32", length=length)


# ----------------------------------------------------------------------------- promises
def test_alpha_zero_is_the_mean_and_large_k_the_mean_times_one_plus_alpha():
    nll, _ = problem("float32")
    for options, factor in (({"alpha": 0.0}, 1), ({"num_largest": LENGTH}, 1.7)):
        found = _smoothed(nll, **options)
        assert_close(found, factor * nll.mean(-1), dtype="float32", length=LENGTH, c=8)


def test_k_of_one_is_the_maximum():
    values, _ = problem("float32")
    np.testing.assert_array_equal(_top_k_mean(values, k=1), values.max(-1))


def test_a_row_without_tokens_has_value_and_gradient_zero():
    nothing = jnp.zeros((2, 3), bool)
    for function in (
        lambda x: losses.smoothed_token_loss(x, where=nothing),
        lambda x: numerics.top_k_mean(x, k=2, where=nothing),
    ):
        for leaf in with_gradient(function, jnp.full((2, 3), jnp.nan)):
            np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_makes_its_row_nan_whatever_its_sign(sign):
    values = jnp.array([[3.0, sign * jnp.nan, 1.0], [3.0, 2.0, 1.0]])
    np.testing.assert_array_equal(_top_k_mean(values, k=1), [np.nan, 3])
    found = _smoothed(values, num_largest=1)
    np.testing.assert_array_equal(np.isnan(found), [True, False])


def test_infinities_are_values_like_others():
    values = jnp.array([[-jnp.inf, 2.0, 4.0], [jnp.inf, 1e4, -1e4], [-jnp.inf] * 3])
    found = _top_k_mean(values, k=2)
    np.testing.assert_array_equal(found, [3, np.inf, -np.inf])
    masked = _top_k_mean(values[:1], k=3, where=jnp.array([True, True, False]))
    np.testing.assert_array_equal(masked, [-np.inf])


def test_of_equal_values_the_first_are_among_the_largest():
    gradient = jax.grad(lambda x: _top_k_mean(x, k=2))(jnp.array([1.0, 2, 2, 2]))
    np.testing.assert_array_equal(gradient, [0, 0.5, 0.5, 0])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 3))
def test_algebra(seed, k):
    """Between mean and maximum, falling in k, equivariant to shift, scale and order."""
    random = np.random.default_rng(seed)
    values = jnp.asarray(random.normal(size=(3, 4)), jnp.float32)
    of = lambda values, k: np.asarray(_top_k_mean(values, k=k))
    found = of(values, k)
    assert (found <= of(values, 1) + 1e-6).all()
    assert (found >= of(values, k + 1) - 1e-6).all()
    moved = of(2 * values[:, random.permutation(4)] + 1, k)
    assert_close(moved, 2 * found + 1, dtype="float32", length=4)


@pytest.mark.slow
def test_under_every_transformation():
    nll, where = problem("float32")
    check_transformations(
        lambda nll, where, alpha: losses.smoothed_token_loss(
            nll, where=where, num_largest=2, alpha=alpha
        ),
        nll,
        jnp.asarray(where),
        jnp.asarray(0.7),
        rows=(0, 1),
    )


# ------------------------------------------------------------------------------- errors
BAD = [
    ("num_largest", {"num_largest": 0}, ValueError, "got 0."),
    ("num_largest", {"num_largest": 2.0}, TypeError, "got float."),
    ("alpha", {"alpha": -1.0}, ValueError, "got -1.0."),
    ("alpha", {"alpha": jnp.ones(2)}, ValueError, "got shape (2,)."),
    ("where", {"where": jnp.ones(3)}, TypeError, "got float32."),
    ("where", {"where": jnp.ones(4, bool)}, ValueError, "got (4,)."),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("argument", "options", "error", "got"), BAD)
def test_error_names_function_argument_and_value(argument, options, error, got):
    with pytest.raises(error) as raised:
        losses.smoothed_token_loss(jnp.zeros((2, 3)), **options)
    assert str(raised.value).startswith(f"smoothed_token_loss: `{argument}` must ")
    assert str(raised.value).endswith(got)


@pytest.mark.usefixtures("untyped")
def test_values_must_be_floating_with_an_axis():
    k_mean = functools.partial(numerics.top_k_mean, k=1)
    with pytest.raises(TypeError, match=r"^top_k_mean: `values` must .* got int32\.$"):
        k_mean(jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"^top_k_mean: `values` .* shape \(\)\.$"):
        k_mean(jnp.zeros(()))
