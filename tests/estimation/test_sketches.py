"""Sketches: vectors, Hadamard matrices of SciPy, moments, adjoints, costs, errors."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import scipy.linalg

from softlib.estimation import (
    CountSketch,
    GaussianSketch,
    HadamardSketch,
    TensorHadamardSketch,
    fwht,
)
from softlib.testing import assert_close
from tests.compiled import estimation
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/softmax_regression_case0.npz"
DRAWS: dict[str, Any] = {
    "hadamard": lambda key: HadamardSketch.draw(key, num_inputs=6, num_rows=3),
    "replacement": lambda key: HadamardSketch.draw(
        key, num_inputs=6, num_rows=3, with_replacement=True
    ),
    "gaussian": lambda key: GaussianSketch.draw(key, num_inputs=6, num_rows=3),
    "count": lambda key: CountSketch.draw(key, num_inputs=6, num_rows=3),
    "tensor": lambda key: TensorHadamardSketch.draw(key, num_inputs=(3, 2), num_rows=3),
}


@jax.jit
def applied(sketch: Any, x: Any) -> Any:
    return sketch(x)


def matrix_of(sketch: Any) -> Any:
    return applied(sketch, jnp.eye(sketch.num_inputs, dtype=jnp.float32))


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        sketch = HadamardSketch(
            *(jnp.asarray(data[f"in_{n}"]) for n in ("signs", "rows"))
        )
        found = applied(sketch, jnp.asarray(data["in_lsq_A"]))
        assert_close(found, data["out_srht_A"], dtype="float64", length=128)
        assert (sketch.num_inputs, sketch.num_rows) == (128, 40)


@pytest.mark.parametrize("length", [1, 2, 16, 128])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_transform_is_the_product_with_the_matrix_of_scipy(length, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, length, 2)), dtype)
        wanted = scipy.linalg.hadamard(length) @ np.asarray(x, np.float64)
        found = estimation.fwht(x, axis=1)
        assert found.dtype == jnp.promote_types(dtype, jnp.float32)
        assert_close(found, wanted, dtype=found.dtype, length=length)
        back = estimation.fwht(found, axis=-2, normalized=True) / np.sqrt(length)
        assert_close(back, np.asarray(x, np.float64), dtype=found.dtype, length=length)


@pytest.mark.parametrize("name", DRAWS)
def test_lengths_are_kept_in_expectation(name):
    """The mean of Sᵀ S over draws is the identity, within five errors of each entry."""

    def gram(key: Any) -> Any:
        matrix = matrix_of(DRAWS[name](key))
        return matrix.T @ matrix

    keys = jax.random.split(jax.random.key(0), 4000)
    grams = np.asarray(jax.jit(jax.vmap(gram))(keys), np.float64)
    error = np.maximum(grams.std(0) / np.sqrt(len(grams)), 1e-6)
    assert (np.abs(grams.mean(0) - np.eye(6)) < 5 * error).all()


@pytest.mark.parametrize("name", DRAWS)
def test_a_sketch_is_linear_with_an_adjoint_and_keeps_float64(name):
    with jax.enable_x64():
        sketch = DRAWS[name](jax.random.key(3))
        rng = np.random.default_rng(0)
        x, y = (
            jnp.asarray(rng.normal(size=(6, 2))),
            jnp.asarray(rng.normal(size=(3, 2))),
        )
        matrix = np.asarray(applied(sketch, jnp.eye(6)))
        assert matrix.dtype == np.float64
        assert_close(
            applied(sketch, x), matrix @ np.asarray(x), dtype="float64", length=6
        )
        (back,) = jax.linear_transpose(sketch, x)(y)
        assert_close(back, matrix.T @ np.asarray(y), dtype="float64", length=6)
        assert matrix_of(sketch).dtype == np.float32


def test_all_rows_keep_lengths_exactly():
    sketch = HadamardSketch.draw(jax.random.key(0), num_inputs=6, num_rows=8)
    matrix = np.asarray(matrix_of(sketch))
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(6), atol=1e-6)


def test_a_count_sketch_has_one_entry_for_each_input():
    matrix = np.asarray(matrix_of(DRAWS["count"](jax.random.key(1))))
    np.testing.assert_array_equal(np.abs(matrix).sum(0), np.ones(6))
    np.testing.assert_array_equal((matrix != 0).sum(0), np.ones(6))


def test_a_product_is_sketched_by_its_factors():
    sketch = TensorHadamardSketch.draw(
        jax.random.key(0), num_inputs=(3, 5), num_rows=16
    )
    left, right = (np.asarray(matrix_of(one)) for one in (sketch.left, sketch.right))
    # Row by row the Kronecker product of the rows of both.
    rows = np.einsum("mi,mj->mij", left, right).reshape(16, 15) * 4
    np.testing.assert_allclose(matrix_of(sketch), rows, atol=1e-5)
    rng = np.random.default_rng(0)
    u, v = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in (3, 5))
    wanted = rows @ np.kron(u, v)
    np.testing.assert_allclose(sketch.of_factors(u, v), wanted, atol=1e-4)


def test_the_cost_of_the_transform_is_n_log_n():
    """Counted operations; with a square they would grow 256-fold each time."""

    def flops(bits: int) -> float:
        x = jax.ShapeDtypeStruct((2**bits, 1), jnp.float32)
        analysis: Any = jax.jit(fwht).lower(x).cost_analysis()
        return analysis["flops"]

    for bits in (8, 16):
        factor = (bits + 4) / bits
        assert flops(bits + 4) <= 16 * factor * flops(bits) * 1.01
    assert flops(20) <= 2 * 16 * 5 * 2**20 * 1.01


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    key, x = jax.random.key(0), jnp.ones((6, 2))
    with pytest.raises(ValueError, match=r"^fwht: `x` must have a .* got 6"):
        fwht(x)
    with pytest.raises(ValueError, match=r"^fwht: `axis` must hold axes"):
        fwht(x, axis=2)
    with pytest.raises(TypeError, match=r"^fwht: `x` must have a floating dtype"):
        fwht(jnp.ones(4, int))
    draw: Any = HadamardSketch.draw
    with pytest.raises(ValueError, match=r"draw: `num_rows` must be .* 8 .* got 9"):
        draw(key, num_inputs=6, num_rows=9)
    with pytest.raises(ValueError, match=r"draw: `num_inputs` must be at least 1"):
        GaussianSketch.draw(key, num_inputs=0, num_rows=9)
    pair: Any = TensorHadamardSketch.draw
    with pytest.raises(ValueError, match=r"`num_inputs` must be the lengths of two"):
        pair(key, num_inputs=6, num_rows=9)
    for draw in DRAWS.values():
        sketch = draw(key)
        with pytest.raises(ValueError, match=r"`x` must have 6 entries on its first"):
            sketch(jnp.ones((5, 2)))
        with pytest.raises(TypeError, match=r"`x` must have a floating dtype"):
            sketch(jnp.ones((6, 2), int))
