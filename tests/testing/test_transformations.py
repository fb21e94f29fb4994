"""The battery passes what is right, and each of its checks fails on what breaks it."""

import itertools

import jax
import numpy as np
import pytest
from jax import lax

from softlib.testing import TRANSFORMATIONS, check_transformations
from tests.host import jnp

X = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
W = jnp.linspace(0.5, 2.0, 15).reshape(3, 5)


def right(x, w):
    return jnp.tanh(x @ w).sum(1), (x @ w).argmax(1)


def only(name):
    """Skips all checks but one."""
    return {other: f"only {name}" for other in TRANSFORMATIONS if other != name}


def test_a_function_without_faults_passes_all_checks():
    check_transformations(right, X, W)


def test_functions_without_a_derivative_or_floating_output_pass():
    check_transformations(lambda x: x > 0, X)
    check_transformations(lambda i: i.sum(1), jnp.arange(24).reshape(8, 3))


def test_a_reduction_passes_without_the_checks_that_divide_rows():
    reason = "the rows are summed"
    check_transformations(
        lambda x, w: right(x, w)[0].sum(),
        X,
        W,
        rows=(),
        skip={"shard_map": reason, "sharded_jit": reason},
    )


def test_a_custom_vjp_passes_without_forward_mode():
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    with pytest.raises(AssertionError, match="`forward_mode`"):
        check_transformations(sine, X, skip=only("forward_mode"))
    check_transformations(sine, X, skip={"forward_mode": "it has a custom_vjp"})


# ------------------------------------------------------- one broken function per check
def differs_when_traced(x):
    return x if isinstance(x, jax.core.Tracer) else x + 1


def needs_values(x):
    return x[:, 0] if x.sum() > 9 else x[:, 1]


@jax.custom_batching.custom_vmap
def wrong_batching(x):
    return jnp.sin(x)


@wrong_batching.def_vmap
def _(size, batched, x):
    del size, batched
    return jnp.cos(x), True


def with_derivative(slope):
    """`sin`, whose reverse rule is `slope`."""

    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (slope(x, g),))
    return sine


@jax.custom_jvp
def wrong_tangent(x):
    return jnp.sin(x)


wrong_tangent.defjvp(lambda x, t: (jnp.sin(x[0]), t[0]))


@jax.custom_vjp
def calls_itself(x):
    return jnp.sin(x)


calls_itself.defvjp(
    lambda x: (calls_itself(x), x), lambda x, g: (g * jnp.cos(calls_itself(x)),)
)


@jax.custom_vjp
def forgets_the_sum(x, w):
    return (x @ w).sum(1)


def _forgets_the_sum_backward(residuals, g):
    x, w = residuals
    g = jnp.broadcast_to(g[:, None], (x.shape[0], w.shape[1]))
    # The cast hides from shard_map that this sum is over the rows of one device only.
    return g @ w.T, lax.stop_gradient(x.T @ g) * 0.5 + 0.5 * (x.T @ g)


forgets_the_sum.defvjp(lambda x, w: ((x @ w).sum(1), (x, w)), _forgets_the_sum_backward)


def wrong_on_few_rows(x):
    return x.sum(1) if x.shape[0] > 4 else x.sum(1) + 1


def dislikes_meshes(x):
    return x + len(jax.sharding.get_abstract_mesh().axis_names)


def random_at_run_time(x):
    draw = lambda a: np.random.default_rng().normal(size=a.shape).astype(a.dtype)
    return lax.stop_gradient(
        jax.pure_callback(draw, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    )


CALLS = itertools.count(1)


def differs_under_checkpoint(x):
    return x * next(CALLS)  # tracing it a second time finds another function


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("jit", differs_when_traced),
        ("jit", needs_values),
        ("vmap", wrong_batching),
        ("reverse_mode", with_derivative(lambda x, g: g)),
        ("forward_mode", wrong_tangent),
        (
            "gradient_of_gradient",
            with_derivative(lambda x, g: g * lax.stop_gradient(jnp.cos(x))),
        ),
        (
            "hessian_vector_product",
            with_derivative(lambda x, g: lax.stop_gradient(g) * jnp.cos(x)),
        ),
        ("hessian_vector_product", calls_itself),
        ("checkpoint", differs_under_checkpoint),
        ("shard_map", wrong_on_few_rows),
        ("sharded_jit", dislikes_meshes),
        ("determinism", random_at_run_time),
    ],
)
def test_check_fails_on_a_function_that_breaks_it(name, function):
    with pytest.raises(AssertionError, match=f"^check_transformations: `{name}`: "):
        check_transformations(function, X, skip=only(name))


def test_shard_map_finds_a_backward_rule_that_does_not_sum_over_devices():
    with pytest.raises(AssertionError, match="`shard_map`"):
        check_transformations(forgets_the_sum, X, W, skip=only("shard_map"))


def test_every_failure_is_reported():
    wrong = with_derivative(lambda x, g: g)
    with pytest.raises(AssertionError) as raised:
        check_transformations(wrong, X)
    for name in ("reverse_mode", "forward_mode"):
        assert f"`{name}`" in str(raised.value)
    assert "`determinism`" not in str(raised.value)


def test_bfloat16_passes_at_its_own_precision():
    check_transformations(right, X.astype(jnp.bfloat16), W.astype(jnp.bfloat16))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ((X,), {"skip": {"jot": "why"}}, ValueError, "`skip`.*jit, vmap.*got 'jot'"),
        ((X,), {"skip": {"jit": " "}}, ValueError, "`skip`.*reason.*'jit'"),
        ((X,), {"rows": (1,)}, ValueError, r"`rows`.*\[0, 1\), got 1"),
        ((X,), {"rows": ()}, ValueError, r"`rows`.*got \(\)"),
        ((X, W), {"rows": (0, 1)}, ValueError, r"`rows`.*\(8, 3\), \(3, 5\)"),
        ((X[:1],), {}, ValueError, "`rows`.*divided over.*got 1 rows"),
        ((X,), {"differentiable": (-1,)}, ValueError, "`differentiable`.*got -1"),
        (
            (jnp.arange(8),),
            {"differentiable": (0,)},
            TypeError,
            "`differentiable`.*floating.*int32",
        ),
    ],
)
def test_error_names_argument_condition_and_value(arrays, options, error, message):
    with pytest.raises(error, match=message):
        check_transformations(lambda *a: a[0], *arrays, **options)
