"""Sketched least squares: vectors, the bound over draws, the adversary, errors."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from softlib.estimation import (
    CountSketch,
    GaussianSketch,
    HadamardSketch,
    TensorHadamardSketch,
    sketched_lstsq,
)
from softlib.testing import assert_close
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/softmax_regression_case0.npz"
KINDS: dict[str, Any] = {
    "hadamard": HadamardSketch,
    "gaussian": GaussianSketch,
    "count": CountSketch,
}


def random_problem(n: int, d: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)) * np.geomspace(1, 10, d), rng.normal(size=n)


def adversary(n: int, d: int) -> tuple[Any, Any]:
    """The identity above zeros; a target on d rows that A does not reach."""
    matrix = np.zeros((n, d))
    matrix[:d] = np.eye(d)
    target = np.zeros(n)
    target[d : 2 * d] = 1
    return matrix, target


def errors(kind: Any, problem: Any, num_rows: int, draws: int, **options: Any) -> Any:
    """The greatest error of a coordinate, its bound and |r| |A⁺| for each draw."""
    matrix, target = (jnp.asarray(part, jnp.float32) for part in problem)
    exact, *_ = np.linalg.lstsq(*problem)
    norm = np.linalg.norm(problem[0] @ exact - problem[1])
    unit = norm * np.linalg.norm(np.linalg.pinv(problem[0]), 2)

    @jax.jit
    def of(key: Any) -> Any:
        sketch = kind.draw(key, num_inputs=len(target), num_rows=num_rows)
        found = sketched_lstsq(sketch, matrix, target, **options)
        error = jnp.abs(found.solution - jnp.asarray(exact, jnp.float32)).max()
        return error, found.error_bound

    keys = jax.random.split(jax.random.key(0), draws)
    error, bound = jax.jit(functools.partial(jax.lax.map, of, batch_size=20))(keys)
    return np.asarray(error), np.asarray(bound), unit


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        signs, rows, matrix, target = (
            jnp.asarray(data[f"in_{name}"])
            for name in ("signs", "rows", "lsq_A", "lsq_b")
        )
        found = jax.jit(sketched_lstsq)(HadamardSketch(signs, rows), matrix, target)
        check = functools.partial(assert_close, dtype="float64", length=128)
        check(found.solution, data["out_sketched_x"])
        check(
            found.residual_norm,
            np.linalg.norm(
                data["in_lsq_A"] @ data["out_sketched_x"] - data["in_lsq_b"]
            ),
        )
        assert np.abs(found.solution - data["out_exact_x"]).max() < found.error_bound
        triangle = np.linalg.qr(data["out_srht_A"])[1]
        longest = np.linalg.norm(np.linalg.inv(triangle), axis=1).max()
        bound = found.residual_norm * longest * np.sqrt(2 / 40 * np.log(5 / 0.01))
        check(found.error_bound, bound)


@pytest.mark.parametrize("kind", ["gaussian", "hadamard"])
@pytest.mark.parametrize("problem", [random_problem, adversary])
def test_the_bound_holds_as_often_as_it_says(kind, problem):
    given = problem(64, 4)
    error, bound, _ = errors(KINDS[kind], given, 24, 2000, delta=0.1)
    share = (error > bound).mean()
    assert share < 0.1
    # Not by far too large, either.
    assert np.quantile(error / bound, 0.99) > 0.6


def test_a_sparse_sketch_puts_the_error_into_one_coordinate():
    """Collisions cost |r| |A⁺| / √d with any number of rows; dense maps gain by it."""
    given = adversary(256, 16)
    found = {}
    for name, kind in KINDS.items():
        for rows in (64, 240):
            error, _, unit = errors(kind, given, rows, 60)
            # Two rows of the identity in one bucket: the sketched matrix is singular.
            found[name, rows] = np.nanquantile(error / unit, 0.95)
    for name in ("hadamard", "gaussian"):
        assert found[name, 240] < 0.65 * found[name, 64]
        assert found[name, 240] < 0.2
    for rows in (64, 240):
        assert found["count", rows] > 0.24


@pytest.mark.slow
def test_the_figures_at_4096_rows():
    given = adversary(4096, 16)
    for name, kind in KINDS.items():
        draws = 20 if name == "gaussian" else 60  # drawing it takes long
        error, _, unit = errors(kind, given, 1024, draws)
        median, most = np.nanquantile(error / unit, [0.5, 0.95])
        if name == "count":
            np.testing.assert_allclose([median, most], [0, 0.25], atol=0.01)
        else:
            assert most < 0.12
            assert 0.03 < median < 0.08


# ---------------------------------------------------------------------------- promises
def test_an_exact_fit_is_found():
    with jax.enable_x64():
        matrix, _ = random_problem(100, 5)
        target = matrix @ np.arange(5.0)
        for kind in KINDS.values():
            sketch = kind.draw(jax.random.key(0), num_inputs=100, num_rows=40)
            found = sketched_lstsq(sketch, jnp.asarray(matrix), jnp.asarray(target))
            np.testing.assert_allclose(found.solution, np.arange(5), atol=1e-10)
            assert found.residual_norm < 1e-8


def test_products_of_factors_and_narrow_dtypes():
    sketch = TensorHadamardSketch.draw(
        jax.random.key(0), num_inputs=(8, 8), num_rows=48
    )
    matrix, target = random_problem(64, 3)
    a, b = jnp.asarray(matrix, jnp.bfloat16), jnp.asarray(target, jnp.bfloat16)
    found = sketched_lstsq(sketch, a, b)
    exact, *_ = np.linalg.lstsq(np.float64(a), np.float64(b))
    assert found.solution.dtype == jnp.float32
    assert np.abs(found.solution - exact).max() < 2 * found.error_bound


def test_a_singular_matrix_is_not_finite():
    sketch = HadamardSketch.draw(jax.random.key(0), num_inputs=8, num_rows=8)
    found = sketched_lstsq(sketch, jnp.zeros((8, 2)), jnp.ones(8))
    assert not np.isfinite(found.solution).any()
    assert not np.isfinite(found.error_bound)


def test_derivatives_are_those_of_differences():
    with jax.enable_x64():
        sketch = HadamardSketch.draw(jax.random.key(0), num_inputs=12, num_rows=8)
        given = tuple(jnp.asarray(part) for part in random_problem(12, 3))
        run = jax.jit(functools.partial(sketched_lstsq, sketch))
        check_grads(run, given, order=2, modes=["rev"], rtol=1e-3)
        check_grads(run, given, order=1, modes=["fwd"])


def test_batches_are_loops():
    sketch = HadamardSketch.draw(jax.random.key(0), num_inputs=12, num_rows=8)
    matrix, target = random_problem(12, 3)
    targets = jnp.asarray([target, 2 * target, -target], jnp.float32)
    matrix = jnp.asarray(matrix, jnp.float32)
    found = jax.jit(jax.vmap(lambda b: sketched_lstsq(sketch, matrix, b).solution))(
        targets
    )
    one = sketched_lstsq(sketch, matrix, targets[0]).solution
    wanted = np.outer([1, 2, -1], one)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    sketch = HadamardSketch.draw(jax.random.key(0), num_inputs=8, num_rows=4)
    run: Any = sketched_lstsq
    b = jnp.ones(8)
    with pytest.raises(
        ValueError, match=r"^sketched_lstsq: `sketch` must map the 8 rows"
    ):
        run(sketch, jnp.ones((8, 5)), b)
    with pytest.raises(
        ValueError, match=r"`sketch` must map the 9 rows .* got one of 8"
    ):
        run(sketch, jnp.ones((9, 2)), jnp.ones(9))
    with pytest.raises(TypeError, match=r"`sketch` must be a sketch, got str"):
        run("srht", jnp.ones((8, 2)), b)
    with pytest.raises(ValueError, match=r"`matrix` must have shape \(n, d\)"):
        run(sketch, jnp.ones((8, 0)), b)
    with pytest.raises(ValueError, match=r"`target` must have shape \(8,\)"):
        run(sketch, jnp.ones((8, 2)), jnp.ones(7))
    with pytest.raises(TypeError, match=r"`target` must have a floating dtype"):
        run(sketch, jnp.ones((8, 2)), jnp.ones(8, int))
    with pytest.raises(ValueError, match=r"`delta` must be in \[0, 1\], got 2"):
        run(sketch, jnp.ones((8, 2)), b, delta=2.0)
