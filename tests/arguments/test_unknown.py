"""Keywords that a function does not have, and arrays that are still in a layer."""

from typing import Any

import jax.numpy as jnp
import pytest
from flax import linen, nnx

import softlib
from softlib import attention, losses, masks, softmax

pytestmark = pytest.mark.usefixtures("untyped")

HIDDEN, WEIGHT, LABELS = jnp.ones((3, 4)), jnp.ones((5, 4)), jnp.zeros(3, int)
CROSS_ENTROPY: Any = losses.softmax_cross_entropy
VALUE: Any = softlib.LinearLogits
ENTMAX: Any = softmax.entmax
HEADS = jnp.ones((2, 6, 3, 4))


def refused(call, *words):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("z_loss", "the penalty on the squared logsumexp is `logsumexp_penalty`"),
        ("softcap", "softlib.LinearLogits(hidden, weight, softcap=...)"),
        ("label_smoothin", "perhaps `label_smoothing` is meant"),
        ("ignore_index", "write `where=labels != ignore_index`"),
        ("reduction", "`softlib.masked_mean` reduces"),
        ("weight", "weights of classes are `class_weights`"),
        ("nothing_like_it", "its arguments are `logits`, `labels`"),
    ],
)
def test_a_keyword_that_a_loss_does_not_have(name, hint):
    call = lambda: CROSS_ENTROPY(HIDDEN, LABELS, **{name: 1.0})
    refused(call, f"softmax_cross_entropy: got an unexpected keyword argument `{name}`")
    refused(call, hint)


def test_the_penalty_is_said_to_be_elsewhere_by_functions_without_it():
    call = lambda **o: losses.softmax_focal_loss(HIDDEN, LABELS, **o)
    refused(lambda: call(z_loss=1.0), "softlib.losses.router_z_loss")


def test_a_misspelt_option_of_a_value_and_of_options_that_are_passed_on():
    refused(
        lambda: VALUE(HIDDEN, WEIGHT, softcaps=3.0),
        "LinearLogits: got an unexpected",
        "`softcap`",
    )
    linear = losses.linear_softmax_cross_entropy
    options = {"softcapp": 3.0}
    refused(lambda: linear(HIDDEN, WEIGHT, LABELS, **options), "`softcap` is meant")


def test_a_layer_or_a_box_in_the_place_of_its_array():
    layer = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    embed = nnx.Embed(5, 4, rngs=nnx.Rngs(0))
    box = linen.Partitioned(WEIGHT, (None, None))
    of = lambda weight: lambda: softlib.LinearLogits(HIDDEN, weight)
    refused(of(layer), "got Linear, a layer; its array is `.kernel`", "vocab_axis=1")
    refused(of(embed), "got Embed, a layer; its array is `.embedding`")
    refused(of(box), "got Partitioned; its array is `.unbox()`")


def test_a_parameter_of_nnx_is_an_array():
    assert of_parameter().shape == (3, 5)


def of_parameter():
    parameter = nnx.Param(WEIGHT)
    return VALUE(HIDDEN, parameter)


@pytest.mark.parametrize(
    ("shape", "hints"),
    [
        ((6, 6), ["`mask[None, None]` for pairs of all"]),
        ((2, 6, 6), ["`mask[:, None]` for pairs of each sequence"]),
        (
            (2, 6),
            ["`mask[:, None, None, :]` for keys", "masks.Padding", "masks.Segments"],
        ),
        ((5,), ["got shape (5,)."]),
    ],
)
def test_a_mask_of_fewer_axes(shape, hints):
    mask = jnp.ones(shape, bool)
    call = lambda: attention.dot_product_attention(HEADS, HEADS, HEADS, mask=mask)
    refused(call, "`mask` must have 4 axes", *hints)


def test_the_class_of_a_mask_in_the_place_of_a_mask():
    mask: Any = masks.Causal
    call = lambda: attention.dot_product_attention(
        *[HEADS] * 3,
        mask=mask,
    )
    refused(call, "got the class Causal; write `Causal(...)`")


def test_an_option_by_position_in_the_place_of_an_axis():
    refused(lambda: ENTMAX(HIDDEN, 1.5), "entmax: `axis` must be an int", "1.5")


def test_the_package_lists_the_library_only():
    assert set(dir(softlib)) == {*softlib.__all__, "__version__"}
