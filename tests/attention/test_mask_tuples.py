"""A tuple of masks holds where all of them hold."""

import jax
import numpy as np
import pytest

from softlib import attention, masks
from softlib.testing import assert_close
from tests.host import jnp

B, T, S, N, H = 2, 9, 11, 4, 3


def operands():
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, 2, H), (B, S, 2, H)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def arrays():
    """Of different shapes; query 4 of the first example attends to nothing."""
    rng = np.random.default_rng(1)
    per_head = rng.random((1, N, T, S)) < 0.7
    per_example = rng.random((B, 1, T, 1)) < 0.9
    per_example[0, :, 4] = False
    return per_head, per_example


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_all_masks_of_a_tuple_must_hold(implementation):
    values = (masks.Window(4, 2), masks.Padding(key=jnp.array([11, 6])))
    per_head, per_example = arrays()
    both = values[0].materialize(T, S)[None] & np.asarray(values[1].materialize(T, S))
    whole = both[:, None] & per_head & per_example

    @jax.jit
    def attend(operands, mask):
        def loss(operands):
            out, lse = attention.dot_product_attention(
                *operands, mask=mask, return_lse=True, implementation=implementation
            )
            return jnp.sin(out).sum(), (out, lse)

        return jax.grad(loss, has_aux=True)(operands)

    found = attend(operands(), (values[0], per_head, values[1], per_example))
    expected = attend(operands(), whole)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_close(one, other, dtype="float32", length=S * H)
    out, lse = found[1]
    assert not out[0, 4].any()
    assert (lse[0, 4] == -jnp.inf).all()


def test_a_tuple_of_nothing_is_no_mask():
    found = attention.dot_product_attention(*operands(), mask=())
    expected = attention.dot_product_attention(*operands())
    np.testing.assert_array_equal(found, expected)


def test_other_things_in_a_tuple_raise(untyped):
    plan = attention.block_plan(None, T, S)
    for wrong, name in ((plan, "BlockPlan"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"`mask` must hold only .* got {name}"):
            attention.dot_product_attention(*operands(), mask=(masks.Causal(), wrong))
