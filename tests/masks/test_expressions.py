"""Masks print as the expression that makes them."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import masks
from softlib.masks import (
    All,
    Between,
    Blocks,
    Causal,
    Chunked,
    Dilated,
    GlobalTokens,
    Mask,
    Padding,
    PerAxis,
    Prefix,
    Radial,
    Segments,
    Window,
)
from tests.host import jnp
from tests.masks.random_masks import compositions

IDS = jnp.array([0, 0, 1])


def near(query, first, second):
    return abs(first - second) < query


PRINTED = [
    (All(), "All()"),
    (Causal(), "Causal()"),
    (Causal(-1), "Causal(-1)"),
    (Window(3, None), "Window(3, None)"),
    (Dilated(2), "Dilated(2)"),
    (Chunked(4), "Chunked(4)"),
    (Prefix(5), "Prefix(5)"),
    (GlobalTokens(0), "GlobalTokens(0)"),
    (GlobalTokens(0, 4), "GlobalTokens(0, 4)"),
    (Radial(6), "Radial(6)"),
    (Radial(6, 0, rule="pow2"), "Radial(6, sink_frames=0, rule='pow2')"),
    (Causal() & ~Window(3, 0), "Causal() & ~Window(3, 0)"),
    (Causal() & Prefix(1) & Prefix(2), "Causal() & Prefix(1) & Prefix(2)"),
    (Causal() & (Prefix(1) & Prefix(2)), "Causal() & (Prefix(1) & Prefix(2))"),
    (Causal() & Prefix(1) | Prefix(2), "(Causal() & Prefix(1)) | Prefix(2)"),
    (~(Causal() | Prefix(1)), "~(Causal() | Prefix(1))"),
    (Causal().shift(3), "Causal().shift(3)"),
    ((~Causal()).shift(0, 2), "(~Causal()).shift(0, 2)"),
    (PerAxis(Causal(), None), "PerAxis(Causal(), None)"),
    (
        PerAxis(None, Causal() | Prefix(1), joint=Between(2, 1, Causal(-1))),
        "PerAxis(None, Causal() | Prefix(1), joint=Between(2, 1, Causal(-1)))",
    ),
    (
        PerAxis(None, None, joint=(Between(1, 2, Causal()), near)),
        "PerAxis(None, None, joint=(Between(1, 2, Causal()), near))",
    ),
    # Arrays are data: their dtype and shape stand for them.
    (Blocks(np.ones((2, 3), bool), 8), "Blocks(bool[2,3], (8, 8))"),
    (Segments(IDS), "Segments(int32[3])"),
    (Segments(IDS, IDS[:2]), "Segments(int32[3], int32[2])"),
    (Padding(key=IDS), "Padding(key=int32[3])"),
    (Causal().shift(IDS[0], 1), "Causal().shift(int32[], int32[])"),
]


@pytest.mark.parametrize(("mask", "text"), PRINTED, ids=str)
def test_a_mask_prints_as_people_write_it(mask, text):
    assert repr(mask) == str(mask) == text


def test_every_public_mask_is_above():
    printed = {type(mask).__name__ for mask, _ in PRINTED} | {"Between"}
    public = {
        name
        for name in masks.__all__
        if isinstance(value := getattr(masks, name), type)
        and hasattr(value, "_is_arithmetic")
    }
    assert public - {"Mask"} <= printed


def test_a_traced_mask_prints_its_shapes():
    texts = []
    jax.jit(lambda mask: texts.append(repr(mask)))(Segments(IDS) & Causal())
    assert texts == ["Segments(int32[3]) & Causal()"]


NAMES = {name: getattr(masks, name) for name in masks.__all__}
static = compositions.map(lambda case: case.mask).filter(
    lambda mask: "Blocks" not in repr(mask)
)


@given(static)
@settings(deadline=None, max_examples=100)
def test_evaluating_what_is_printed_gives_the_mask(mask):
    assert eval(repr(mask), dict(NAMES)) == mask


@given(st.lists(st.none() | static, min_size=1, max_size=3), static, st.integers(0, 1))
@settings(deadline=None, max_examples=40)
def test_so_it_does_for_tuples_of_keys(axes, joint, order):
    between = Between(order, 1 - order, joint)
    for mask in (PerAxis(*axes), PerAxis(*axes, joint=between)):
        assert eval(repr(mask), dict(NAMES)) == mask


def test_a_mask_without_a_definition_prints_too():
    assert repr(Mask()) == "Mask()"
