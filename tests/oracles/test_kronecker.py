"""The oracle of Kronecker attention agrees with differences and a second program."""

import itertools
import pathlib

import jax
import numpy as np
import pytest

from tests.oracles.attention import attention
from tests.oracles.kronecker import kronecker_attention

DATA = pathlib.Path(__file__).parent.parent / "data"


def close(one, two):
    np.testing.assert_allclose(one, two, rtol=0, atol=2e-6)  # stored in float32


@pytest.mark.parametrize(("name", "scale"), [("d", 1 / 4), ("sqrt", 1 / 2)])
def test_agrees_with_independent_vectors(name, scale):
    data = np.load(DATA / "kronecker_attention_case0.npz")
    i, j = np.arange(12)[:, None], np.arange(12)[None, :]
    first = (j > i - data["in_w1"]) & (j <= i)
    second = (j > i - data["in_w2"]) & (j <= i)
    second[data["in_masked_row"]] = False
    found = kronecker_attention(
        data["in_q"],
        (data["in_k1"], data["in_k2"]),
        (data["in_v1"], data["in_v2"]),
        allowed=first[:, :, None] & second[:, None, :],
        scale=scale,
        g_out=data["in_dout"],
        g_lse=np.zeros((1, 12, 4)),
    )
    close(found.out, data[f"out_{name}_out"])
    close(found.lse, np.moveaxis(data[f"out_{name}_lse"], 1, 2))
    close(found.gradients["query"], data[f"out_{name}_dq"])
    for t in range(2):
        close(found.gradients["keys"][t], data[f"out_{name}_dk{t + 1}"])
        close(found.gradients["values"][t], data[f"out_{name}_dv{t + 1}"])


def test_agrees_with_independent_vectors_of_order_4():
    data = np.load(DATA / "kronecker_attention_case0.npz")
    one = lambda a: a[None, :, None]
    found = kronecker_attention(
        one(data["in_o4_q"]),
        tuple(map(one, data["in_o4_k"])),
        tuple(map(one, data["in_o4_v"])),
        g_out=one(data["in_o4_dout"]),
        g_lse=np.zeros((1, 6, 1)),
    )
    exact = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    exact(found.out, one(data["out_o4_out"]))
    exact(found.lse[0, :, 0], data["out_o4_lse"])
    exact(found.gradients["query"], one(data["out_o4_dq"]))
    for name, letter in (("keys", "k"), ("values", "v")):
        exact(
            np.stack(found.gradients[name]), data["out_o4_d" + letter][:, None, :, None]
        )


@pytest.mark.parametrize("lengths", [(6,), (3, 4), (2, 3, 2)])
def test_gradients_are_those_of_differences(lengths):
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape)
    arrays = {
        "query": draw(2, 5, 4, 3),
        "keys": tuple(draw(2, s, 2, 3) for s in lengths),
        "values": tuple(draw(2, s, 2, 7) for s in lengths),
        "scale": np.array(0.8),
    }
    allowed = random.random((2, 4, 5, *lengths)) < 0.6
    allowed[:, :, 3] = False
    g_out, g_lse = draw(2, 5, 4, 7), draw(2, 5, 4)

    def total(arrays):
        found = kronecker_attention(**arrays, allowed=allowed)
        lse = np.where(found.lse == -np.inf, 0, found.lse)
        return (g_out * found.out).sum() + (g_lse * lse).sum()

    found = kronecker_attention(**arrays, allowed=allowed, g_out=g_out, g_lse=g_lse)
    assert found.gradients.keys() == arrays.keys()
    leaves, tree = jax.tree.flatten(arrays)
    gradients = tree.flatten_up_to(found.gradients)
    for place, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        assert gradient.shape == leaf.shape
        direction, step = random.normal(size=leaf.shape), 1e-6
        ends = []
        for sign in (1, -1):
            moved = list(leaves)
            moved[place] = leaf + sign * step * direction
            ends.append(total(tree.unflatten(moved)))
        difference = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(
            (gradient * direction).sum(), difference, rtol=1e-6, atol=1e-7
        )
    assert (found.out[:, 3] == 0).all()
    assert (found.lse[:, 3] == -np.inf).all()
    assert (found.gradients["query"][:, 3] == 0).all()


def test_is_the_definition_tuple_by_tuple():
    """Without einsum, head groups or shifts."""
    random = np.random.default_rng(1)
    lengths = (3, 2, 4)
    query = random.normal(size=(1, 3, 4, 2))
    keys = tuple(random.normal(size=(1, s, 2, 2)) for s in lengths)
    values = tuple(random.normal(size=(1, s, 2, 5)) for s in lengths)
    allowed = random.random((1, 4, 3, *lengths)) < 0.7
    found = kronecker_attention(query, keys, values, allowed=allowed, scale=0.7)
    for t, n in np.ndindex(3, 4):
        sums, total = np.zeros(5), 0.0
        for where in itertools.product(*map(range, lengths)):
            if not allowed[(0, n, t, *where)]:
                continue
            product, value = query[0, t, n].copy(), np.ones(5)
            for key, one, s in zip(keys, values, where, strict=True):
                product *= key[0, s, n // 2]
                value *= one[0, s, n // 2]
            weight = np.exp(0.7 * product.sum())
            sums, total = sums + weight * value, total + weight
            assert found.weights[(0, n, t, *where)] > 0
        np.testing.assert_allclose(found.out[0, t, n], sums / total)
        np.testing.assert_allclose(found.lse[0, t, n], np.log(total))


def test_one_key_axis_is_the_oracle_of_attention():
    random = np.random.default_rng(2)
    query = random.normal(size=(2, 5, 4, 3))
    key, value = random.normal(size=(2, 6, 2, 3)), random.normal(size=(2, 6, 2, 7))
    allowed = random.random((2, 4, 5, 6)) < 0.5
    given = {
        "allowed": allowed,
        "g_out": random.normal(size=(2, 5, 4, 7)),
        "g_lse": random.normal(size=(2, 5, 4)),
    }
    one = kronecker_attention(query, (key,), (value,), **given)
    two = attention(query, key, value, scale=1 / 3, **given)
    for x, y in zip(one[:3], two[:3], strict=True):
        np.testing.assert_allclose(x, y)
    for name, gradient in two.gradients.items():
        mine = one.gradients[{"key": "keys", "value": "values"}.get(name, name)]
        mine = mine[0] if isinstance(mine, tuple) else mine
        np.testing.assert_allclose(mine, gradient, atol=1e-12)


def test_an_axis_without_keys_empties_every_row():
    random = np.random.default_rng(3)
    draw = lambda *shape: random.normal(size=shape)
    keys, values = (tuple(draw(1, s, 1, c) for s in (3, 0)) for c in (2, 4))
    found = kronecker_attention(
        draw(1, 5, 2, 2), keys, values, g_out=draw(1, 5, 2, 4), g_lse=draw(1, 5, 2)
    )
    assert (found.out == 0).all()
    assert (found.lse == -np.inf).all()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found.gradients))
