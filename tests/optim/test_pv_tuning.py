"""Tuning of quantized weights: vectors, promises, and a layer that is tuned."""

import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

from softlib import optim, quantize
from softlib.quantize import QuantizedArray
from softlib.testing import assert_close
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/pv_tuning_case0.npz"


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def problem(kind="vectors"):
    weight = drawn(6, 24)
    if kind == "vectors":
        return quantize.quantize_vectors(weight, drawn(9, 4, seed=1))
    if kind == "scaled":
        return quantize.quantize_vectors(weight, drawn(9, 4, seed=1), group_size=8)
    symmetric = kind == "symmetric"
    return quantize.quantize_groups(
        weight, bits=3, group_size=8, is_symmetric=symmetric
    )


KINDS = ("vectors", "scaled", "grid", "symmetric")


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        weights, codebook = map(jnp.asarray, (data["in_weights"], data["in_codebook"]))
        weight = quantize.quantize_vectors(weights, codebook)
        np.testing.assert_array_equal(weight.codes[:, 0], data["out_codes"])
        gradient = jnp.asarray(data["in_grad_weights"])
        # A V step of size 1 subtracts the gradient of the codebook.
        tuning = optim.pv_tuning(None, optax.sgd(1.0))
        after, _ = tuning.update(gradient, tuning.init(weight), weight)
        moved = codebook - after.codebook
        assert_close(moved, data["out_codebook_grad"], dtype="float64", length=24)
        reference = weight.decode() - data["in_step"] * gradient
        fraction = float(data["in_max_fraction"])
        found = optim.pv_code_update(weight, reference, max_fraction=fraction)
        np.testing.assert_array_equal(found.codes[:, 0], data["out_codes_after_p_step"])


def by_hand(weight, reference, fraction, where=None):
    """Codes after a P step, one vector after another, float64."""
    old, reference = (np.asarray(x, np.float64) for x in (weight.decode(), reference))
    codes = np.array(weight.codes)
    width = weight.size // codes.shape[1]
    place = [(i, j) for i in range(codes.shape[0]) for j in range(codes.shape[1])]
    own = lambda array, i, j: array[i, j * width : (j + 1) * width]
    off = {p: np.linalg.norm(own(reference, *p) - own(old, *p)) for p in place}
    allowed = [p for p in place if where is None or where[p]]
    most = max(1, int(np.ceil(fraction * len(place))))
    for i, j in sorted(allowed, key=lambda p: -off[p])[:most]:
        best, nearest = np.inf, -1
        count = 2**weight.bits if weight.codebook is None else len(weight.codebook)
        for code in range(count):
            if weight.codebook is None:
                lowest = 2 ** (weight.bits - 1) if weight.zero is None else 0
                value = np.array([code - lowest], np.float64)
            else:
                value = np.asarray(weight.codebook[code], np.float64)
            if weight.scale is not None:
                group = j * width // (weight.size // weight.scale.shape[1])
                value = value * float(weight.scale[i, group])
                if weight.zero is not None:
                    value = value + float(weight.zero[i, group])
            distance = np.linalg.norm(own(reference, i, j) - value)
            if distance < best - 1e-6:
                best, nearest = distance, code
        codes[i, j] = nearest
    return codes


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_move_to_the_nearest_on_the_farthest_subset(kind, fraction):
    weight, reference = problem(kind), drawn(6, 24, seed=5)
    where = drawn(*weight.codes.shape, seed=6) > -0.5
    update = jax.jit(
        lambda w, r, where: optim.pv_code_update(
            w, r, max_fraction=fraction, where=where
        )
    )
    found = update(weight, reference, where)
    np.testing.assert_array_equal(
        found.codes, by_hand(weight, reference, fraction, np.asarray(where))
    )
    for old, new in zip(weight.parameters, found.parameters, strict=True):
        np.testing.assert_array_equal(old, new)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.1, 0.5]))
def test_trust_bounds_the_change_and_takes_the_farthest_first(seed, ratio):
    weight, reference = problem(), drawn(6, 24, seed=seed)
    free = optim.pv_code_update(weight, reference)
    bound = optim.pv_code_update(weight, reference, trust_ratio=ratio)
    old = np.asarray(weight.decode())
    change = np.linalg.norm(np.asarray(bound.decode()) - old)
    assert change <= ratio * np.linalg.norm(old) * 1.0001
    off = np.linalg.norm(np.reshape(reference - old, (6, 6, 4)), axis=-1)
    moved = np.asarray(bound.codes != weight.codes)
    would = np.asarray(free.codes != weight.codes)
    # No vector stays behind that is farther off than one which moved.
    if moved.any() and (would & ~moved).any():
        assert off[would & ~moved].max() <= off[moved].min()
    np.testing.assert_array_equal(bound.codes[moved], free.codes[moved])


def test_a_reference_that_is_not_finite_keeps_the_code():
    weight = problem()
    reference = (weight.decode() + 3).at[0, 0].set(jnp.nan).at[2, 5].set(jnp.inf)
    found = optim.pv_code_update(weight, reference)
    kept = np.zeros((6, 6), bool)
    kept[0, 0] = kept[2, 1] = True
    np.testing.assert_array_equal(found.codes[kept], weight.codes[kept])
    assert (np.asarray(found.codes)[~kept] != np.asarray(weight.codes)[~kept]).any()


def test_pruned_weights_count_for_nothing():
    where = jnp.arange(24) % 4 < 3
    weight = quantize.quantize_groups(
        drawn(2, 24), bits=4, group_size=8, where=jnp.stack([where, where])
    )
    reference = weight.decode() + jnp.where(where, 0, 9)[None]
    found = optim.pv_code_update(weight, reference, max_fraction=0.2)
    np.testing.assert_array_equal(found.decode(), weight.decode())


# ------------------------------------------------------------------------ whole updates
def test_without_decay_and_limits_it_is_the_straight_through_rule():
    """A float weight that is trained, of which the nearest codes are used."""
    start: Any = problem()
    state: Any
    change: Any
    tuning = optim.pv_tuning(optax.adam(0.4), None, delta_decay=0)
    dense, adam = start.decode(), optax.adam(0.4)
    state, own, weight = tuning.init(start), adam.init(dense), start
    codes = start.codes
    for step in range(6):
        gradient = drawn(6, 24, seed=10 + step)
        weight, state = tuning.update(gradient, state, weight)
        change, own = adam.update(gradient, own)
        dense = dense + change
        nearest = quantize.assign_codes(dense.reshape(-1, 4), start.codebook)
        np.testing.assert_array_equal(weight.codes, nearest.reshape(6, 6))
    assert (weight.codes != codes).any()
    assert_close(
        weight.decode() + state.buffer, dense, dtype="float32", length=10, c=16
    )


def test_trees_of_weights_are_tuned_under_jit():
    weights = {"a": problem("grid"), "b": [problem("scaled")]}
    tuning = optim.pv_tuning(optax.sgd(0.5), optax.adam(0.1), max_fraction=0.25)
    gradients = {"a": drawn(6, 24, seed=1), "b": [drawn(6, 24, seed=2)]}
    state = tuning.init(weights)
    new, state = jax.jit(tuning.update)(gradients, state, weights)
    assert jax.tree.structure(new) == jax.tree.structure(weights)
    for old, found in ((weights["a"], new["a"]), (weights["b"][0], new["b"][0])):
        changed = int((old.codes != found.codes).sum())
        assert 0 < changed <= np.ceil(0.25 * old.codes.size)
        assert (old.scale != found.scale).any()


def layer(seed):
    """A linear layer in vectors of two weights, and its output error."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(32, 32)) / np.sqrt(32)
    inputs = jnp.float32(random.normal(size=(256, 32)) @ mixing)
    wanted = jnp.float32(random.normal(size=(32, 32)))
    codebook = quantize.fit_codebook(
        jax.random.key(seed), wanted, 16, vector_size=2, num_steps=10
    )
    weight = quantize.quantize_vectors(wanted, codebook)
    hessian = inputs.T @ inputs * (2 / 256)

    def loss(w):
        off = w - wanted
        return jnp.einsum("oi,ij,oj->", off, hessian, off) / 2

    return weight, loss, hessian


@pytest.mark.parametrize("seed", range(2))
def test_a_subset_descends_where_a_step_of_all_does_not(seed):
    """One vector at a time with its own smoothness; the loss never rises."""
    weight, loss, hessian = layer(seed)
    whole = 1 / np.linalg.eigvalsh(hessian)[-1]
    blocks = [hessian[i : i + 2, i : i + 2] for i in range(0, 32, 2)]
    own = 1 / max(np.linalg.eigvalsh(block)[-1] for block in blocks)

    count = weight.codes.size
    # Of the largest gradient, which may be at its best, and of a drawn one, in turns.
    drawn_one = np.random.default_rng(seed).integers(0, count, 400)
    may = np.where(np.arange(400) % 2, drawn_one, -1)

    def tuned(step_size, fraction, may):
        def step(weight, only):
            reference = weight.decode() - step_size * jax.grad(loss)(weight.decode())
            where = (only < 0) | (jnp.arange(count) == only)
            new = optim.pv_code_update(
                weight,
                reference,
                max_fraction=fraction,
                where=where.reshape(weight.codes.shape),
            )
            return new, loss(new.decode())

        return jax.lax.scan(step, weight, may)[1]

    of_all = jax.jit(lambda may: tuned(whole, 1.0, may))(np.full(400, -1))
    of_one = jax.jit(lambda may: tuned(own, 1 / count, may))(may)
    assert (np.diff(of_one) <= 1e-4).all()
    assert of_one[-1] < of_all[-1]
    assert of_one[-1] < float(loss(weight.decode()))


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w, r: optim.pv_code_update(r, r), TypeError, "`weight` must be a soft"),
        (
            lambda w, r: optim.pv_code_update(w, r[:2]),
            ValueError,
            "`reference` must have shape",
        ),
        (
            lambda w, r: optim.pv_code_update(w, r, max_fraction=1.5),
            ValueError,
            "`max_fraction` must be at most 1",
        ),
        (
            lambda w, r: optim.pv_code_update(w, r, max_fraction=0),
            ValueError,
            "`max_fraction` must be positive",
        ),
        (
            lambda w, r: optim.pv_code_update(w, r, trust_ratio=-1.0),
            ValueError,
            "`trust_ratio` must be positive",
        ),
        (
            lambda w, r: optim.pv_code_update(w, r, where=r > 0),
            ValueError,
            "`where` must have shape .*one per code",
        ),
        (lambda w, r: optim.pv_tuning(None, None), ValueError, "must be an optimizer"),
        (
            lambda w, r: optim.pv_tuning(optax.sgd(1.0), None, delta_decay=2),
            ValueError,
            "`delta_decay` must be in",
        ),
        (
            lambda w, r: optim.pv_tuning(optax.sgd(1.0), None).init({"a": r}),
            TypeError,
            "`weight` must be a soft",
        ),
    ],
)
def test_wrong_arguments_are_errors(call, error, message):
    weight: Any = problem()
    with pytest.raises(error, match=message):
        call(weight, weight.decode())


def test_codes_of_a_checkpoint_are_tuned():
    weight = QuantizedArray(jnp.zeros((2, 3), int), bits=2, codebook=drawn(4, 2))
    found = optim.pv_code_update(weight, jnp.tile(drawn(4, 2)[3], (2, 3)))
    np.testing.assert_array_equal(found.codes, 3)
