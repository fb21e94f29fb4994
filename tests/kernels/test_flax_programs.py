"""The ordinary program of Flax: float32 parameters, bfloat16 activations, any head."""

from typing import Any

import jax
import pytest
from flax import nnx

import softlib
from softlib.nn import OutputHead
from tests.host import jnp
from tests.kernels.test_gpu_row_statistics_dispatch import HOPPER
from tests.lowered import lowered

FEATURES, CLASSES = 256, 50_304
TOKENS = jax.ShapeDtypeStruct((4, 65), jnp.int32)
# Of a loss, and of its gradient.
KERNELS = {"cuda": ("@mosaic_gpu", 1, 4), "tpu": ("@tpu_custom_call", 1, 3)}


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, is_tied: bool):
        self.embed = nnx.Embed(CLASSES, FEATURES, dtype=jnp.bfloat16, rngs=rngs)
        self.layer = nnx.Linear(FEATURES, FEATURES, dtype=jnp.bfloat16, rngs=rngs)
        self.head = (
            OutputHead(FEATURES, CLASSES, embedding=self.embed)
            if is_tied
            else nnx.Linear(FEATURES, CLASSES, dtype=jnp.bfloat16, rngs=rngs)
        )

    def __call__(self, tokens):
        hidden = nnx.gelu(self.layer(self.embed(tokens)))
        if isinstance(self.head, OutputHead):
            return self.head(hidden)
        assert self.head.bias is not None
        kernel, bias = self.head.kernel[...], self.head.bias[...]
        return softlib.LinearLogits(hidden, kernel, vocab_axis=1, bias=bias)


def program(*, is_tied: bool) -> tuple[Any, Any]:
    """Its loss, and its parameters without their values."""
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0), is_tied=is_tied))
    definition, parameters = nnx.split(model)
    assert {x.dtype for x in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}

    def loss(parameters, tokens):
        logits = nnx.merge(definition, parameters)(tokens)[:, :-1]
        return softlib.losses.softmax_cross_entropy(logits, tokens[:, 1:]).mean()

    return loss, parameters


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "dense"])
def test_its_loss_and_its_gradients_are_kernels(is_tied):
    loss, parameters = program(is_tied=is_tied)
    gradient = jax.grad(loss)
    with jax.sharding.use_abstract_mesh(HOPPER):
        explained = softlib.explain(gradient, parameters, TOKENS)
        for platform, (call, forward, both) in KERNELS.items():
            counts = [
                lowered(platform, function, parameters, TOKENS).count(call)
                for function in (loss, gradient)
            ]
            assert counts == [forward, both], platform
    assert [found.operation for found in explained.operations] == [
        "linear_row_statistics",
        "linear_row_statistics_gradient",
    ]
    for found in explained.operations:
        assert not found.refused
        assert found.runs == {
            "tpu": "pallas_tpu",
            "cuda": "pallas_gpu",
            "elsewhere": "xla",
        }
