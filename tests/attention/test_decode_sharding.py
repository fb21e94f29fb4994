"""Keys divided over devices give the results and gradients of one device."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib import attention
from softlib.testing import assert_close
from tests import operations
from tests.attention.decode_problems import oracle, problem
from tests.host import jnp

LENGTHS = (16, 5, 0, 9)
# Scores of the last two sequences leave the range. With the batch divided as well, one
# group of devices recomputes and the other does not.
FACTORS = (1, 1, 1, 200)
CASES = [
    ((1, 8), "Auto", True, None),
    ((1, 8), "Explicit", False, 0.0),
    ((2, 4), "Auto", False, 0.0),
    ((2, 4), "Explicit", True, 0.0),
]


def arrays_of(**sizes):
    arrays = problem(T=2, S=16, N=2, K=1, sinks=True, **sizes)
    factors = jnp.asarray(FACTORS, jnp.float32)[:, None, None, None]
    return arrays | {"query": arrays["query"] * factors}


def specs(axis):
    cache = P("batch", axis)
    return {
        "query": P("batch"),
        "key": cache,
        "value": cache,
        "scale": P(),
        "sinks": P(),
    }


def with_gradients(call, arrays, lengths, g_out, g_lse):
    def total(arrays):
        found = call(arrays, lengths)
        out, statistics = found.output, found
        lse = jnp.where(statistics.lse == -jnp.inf, 0, statistics.lse)
        return (out * g_out).sum() + (lse * g_lse).sum(), (out, statistics)

    return jax.grad(total, has_aux=True)(arrays)


@pytest.mark.parametrize(("shape", "kind", "check_vma", "phi"), CASES)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_keys_divided_over_devices(shape, kind, check_vma, phi, implementation):
    types = (getattr(AxisType, kind),) * 2
    mesh = jax.make_mesh(shape, ("batch", "keys"), types)
    arrays, lengths = arrays_of(), jnp.asarray(LENGTHS)
    random = np.random.default_rng(1)
    g_out, g_lse = random.normal(size=(4, 2, 2, 5)), random.normal(size=(4, 2, 2))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs("keys"), P("batch")),
        out_specs=attention.DecodeResult(*[P("batch")] * 4),
        check_vma=check_vma,
    )
    def divided(arrays, lengths):
        return attention.decode_attention(
            **arrays,
            key_value_seq_lengths=lengths,
            is_causal=True,
            phi=phi,
            axis_name="keys",
            implementation=implementation,
            return_statistics=True,
        )

    with jax.set_mesh(mesh):
        place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        placed = {name: place(a, specs("keys")[name]) for name, a in arrays.items()}
        run = jax.jit(functools.partial(with_gradients, divided))
        found, (out, statistics) = jax.device_get(
            run(
                placed,
                place(lengths, P("batch")),
                place(jnp.asarray(g_out, jnp.float32), P("batch")),
                place(jnp.asarray(g_lse, jnp.float32), P("batch")),
            )
        )
    expected = oracle(arrays, lengths=LENGTHS, is_causal=True, g_out=g_out, g_lse=g_lse)
    assert_close(out, expected.out, dtype="float32", length=16)
    assert_close(statistics.lse, expected.lse, dtype="float32", length=16)
    assert_close(statistics.max_score, expected.max_score, dtype="float32", length=16)
    outside = expected.outside(0.0, (-70.0, 80.0)) & (phi is not None)
    np.testing.assert_array_equal(statistics.needs_recompute, outside)
    assert outside[3].any() == (phi is not None)
    assert not outside[:3].any()
    for name, gradient in found.items():
        # Scores of 1000 carry a rounding error of their own into every probability.
        wanted = expected.gradients[name]
        assert_close(gradient, wanted, dtype="float32", length=64, c=40)


@pytest.mark.parametrize("phi", [None, 0.0])
def test_a_cache_sharded_by_position_under_plain_jit(phi):
    mesh = jax.make_mesh((2, 4), ("batch", "keys"), (AxisType.Auto,) * 2)
    arrays, lengths = arrays_of(), jnp.asarray(LENGTHS)
    call = functools.partial(
        attention.decode_attention, phi=phi, num_splits=3, return_lse=True
    )
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(a, NamedSharding(mesh, specs("keys")[name]))
            for name, a in arrays.items()
        }
        out, lse = jax.device_get(
            jax.jit(call)(**placed, key_value_seq_lengths=lengths)
        )
    expected = oracle(arrays, lengths=LENGTHS)
    assert_close(out, expected.out, dtype="float32", length=16)
    assert_close(lse, expected.lse, dtype="float32", length=16)


def test_the_fast_path_needs_one_sum_of_floats_and_the_maximum_only_for_the_flag():
    """Before the branch: one psum of (sum, weighted sum), one pmax that no sum uses."""
    mesh = jax.make_mesh((8,), ("keys",), (AxisType.Auto,))
    arrays = problem(S=16)
    cache = P(None, "keys")

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), cache, cache),
        out_specs=P(),
        check_vma=False,
    )
    def call(query, key, value):
        return attention.decode_attention(query, key, value, phi=0.0, axis_name="keys")

    jaxpr = operations.make_jaxpr(call)(arrays["query"], arrays["key"], arrays["value"])
    before, branches = str(jaxpr).split("= cond[")
    assert before.count("= psum") == 1
    assert before.count("= pmax") == 1
    assert branches.count("= psum") == 1
    assert branches.count("= pmax") == 1
