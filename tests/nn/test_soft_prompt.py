"""Soft prompts: what stands where, what is trained, and what is refused."""

from typing import Any

import jax
import numpy as np
import pytest

from softlib import nn
from tests.host import jnp


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_sequence_begins_with_the_prompt(batch, dtype):
    random = np.random.default_rng(0)
    embeddings = jnp.asarray(random.normal(size=(*batch, 5, 4)), dtype)
    prompt = jnp.asarray(random.normal(size=(3, 4)), "float32")
    found = jax.jit(nn.prepend_soft_prompt)(embeddings, prompt)
    assert found.dtype == embeddings.dtype
    assert found.shape == (*batch, 8, 4)
    np.testing.assert_array_equal(found[..., 3:, :], embeddings)
    for row in np.asarray(found[..., :3, :]).reshape(-1, 3, 4):
        np.testing.assert_array_equal(row, np.asarray(prompt.astype(dtype)))


def test_gradient_of_the_prompt_is_summed_over_sequences():
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 4)))
    total = lambda e, p: (nn.prepend_soft_prompt(e, p) * cotangent).sum()
    of_embeddings, of_prompt = jax.jit(jax.grad(total, (0, 1)))(
        jnp.zeros((2, 5, 4)), jnp.zeros((3, 4))
    )
    np.testing.assert_array_equal(of_embeddings, cotangent[:, 3:])
    np.testing.assert_allclose(of_prompt, cotangent[:, :3].sum(0), rtol=1e-6)


@pytest.mark.usefixtures("untyped")
def test_wrong_arguments_are_named():
    function: Any = nn.prepend_soft_prompt
    embeddings = jnp.zeros((2, 5, 4))
    for prompt, error, message in (
        (jnp.zeros((3, 5)), ValueError, r"`soft_prompt` must have shape \(P, D\)"),
        (jnp.zeros((3, 4), int), TypeError, "`soft_prompt`"),
    ):
        with pytest.raises(error, match=f"prepend_soft_prompt: {message}"):
            function(embeddings, prompt)
    with pytest.raises(ValueError, match="`embeddings`"):
        function(jnp.zeros(4), jnp.zeros((3, 4)))
