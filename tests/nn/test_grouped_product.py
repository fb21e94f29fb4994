"""Rows times the matrix of their group: values, derivatives, memory on a CPU."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from softlib.nn._grouped_product import grouped_product
from tests.host import jnp

D, F, ROWS = 5, 3, 333
# Groups without a row, of one row, of blocks and a part, and rows without a group.
SIZES = {"many blocks": [9, 0, 301, 3], "small": [1] * 40, "none": [0, 0]}


def problem(sizes):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(ROWS, D)), rng.normal(size=(len(sizes), D, F))
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def masked(product, sizes, rows, weight):
    """The product, 0 for the rows that belong to no group."""
    real = np.arange(ROWS) < sum(sizes)
    return jnp.where(real[:, None], product(rows, weight, jnp.asarray(sizes)), 0)


def by_definition(rows, weight, sizes):
    owner = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=ROWS)
    return jnp.einsum("rd,rdf->rf", rows, weight[owner])


OWN = functools.partial(grouped_product, precision=None, dtype=jnp.float32)


def close(found, expected):
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * ROWS)


@pytest.mark.parametrize("name", SIZES)
def test_values_and_derivatives_of_both_modes_and_orders(name):
    sizes = SIZES[name]
    rows, weight = problem(sizes)

    def everything(product):
        call = functools.partial(masked, product, sizes)
        loss = lambda *arrays: (call(*arrays) ** 3).sum()
        slopes = jax.grad(loss, (0, 1))

        def of_slopes(*arrays):
            return sum((x**2).sum() for x in slopes(*arrays)) / 100

        @jax.jit
        def run(*arrays):
            return (
                call(*arrays),
                slopes(*arrays),
                jax.jvp(slopes, arrays, (rows + 1, 2 * weight)),
                jax.grad(of_slopes, (0, 1))(*arrays),
            )

        return run(rows, weight)

    close(everything(OWN), everything(by_definition))


def test_mapped_over_rows_weights_and_both():
    sizes = SIZES["many blocks"]
    rows, weight = problem(sizes)
    many = jnp.stack([rows, 2 * rows]), jnp.stack([weight, weight + 1])

    def every(product):
        call = functools.partial(masked, product, sizes)
        slopes = jax.grad(lambda *arrays: (call(*arrays) ** 2).sum(), (0, 1))

        @jax.jit
        def run(many_rows, many_weights):
            return (
                jax.vmap(slopes, (0, None))(many_rows, weight),
                jax.vmap(call, (None, 0))(rows, many_weights),
                jax.vmap(call)(many_rows, many_weights),
            )

        return run(*many)

    close(every(OWN), every(by_definition))


def test_other_groups_and_rows_without_one_may_be_infinite():
    sizes = [9, 20]
    rows, weight = problem(sizes)
    rows = rows.at[9:].set(jnp.inf)
    slope = jax.grad(lambda weight: OWN(rows, weight, jnp.asarray(sizes))[:9].sum())
    found = jax.jit(slope)(weight)
    assert jnp.isfinite(found[0]).all()


def test_narrow_dtypes_are_summed_in_a_wide_one():
    sizes = SIZES["many blocks"]
    narrow = [x.astype(jnp.bfloat16) for x in problem(sizes)]
    call = functools.partial(masked, OWN, sizes)
    found = jax.jit(call)(*narrow)
    assert found.dtype == jnp.float32
    wide = [x.astype(jnp.float32) for x in narrow]
    close(found, masked(by_definition, sizes, *wide))
    slopes = jax.jit(jax.grad(lambda *arrays: call(*arrays).sum(), (0, 1)))(*narrow)
    assert [x.dtype for x in slopes] == [jnp.bfloat16] * 2


def test_work_on_a_cpu_is_that_of_the_rows():
    """Not that of every row times every matrix, which is what XLA makes of it."""
    experts, rows, features = 32, 2048, 64
    arrays = jnp.ones((rows, features)), jnp.ones((experts, features, features))
    sizes = jnp.full(experts, rows // experts)
    loss = lambda rows, weight: (OWN(rows, weight, sizes) ** 2).sum()
    compiled: Any = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
    # The products of a loop body are counted once, so what is read off is memory: all
    # rows times all matrices would be 32 times the results.
    scratch = compiled.memory_analysis().temp_size_in_bytes
    results = 4 * features * (rows + experts * features)
    assert scratch < 6 * results


def test_one_program_serves_several_platforms():
    call = jax.jit(functools.partial(masked, OWN, SIZES["many blocks"]))
    operands = problem(SIZES["many blocks"])
    exported = jax.export.export(call, platforms=["cpu", "tpu", "cuda"])(*operands)
    close(exported.call(*operands), call(*operands))
