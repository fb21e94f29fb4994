"""Random masks with their definition: strategies for the property tests."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from softlib import masks
from tests.oracles import masks as oracle


class Case(NamedTuple):
    mask: masks.Mask
    keeps: Any

    def __repr__(self) -> str:
        return repr(self.mask)


sizes = st.integers(1, 9)
reach = st.none() | st.integers(0, 12)


def _case(mask, definition):
    return lambda *parameters: Case(mask(*parameters), definition(*parameters))


@st.composite
def block_masks(draw):
    random = np.random.default_rng(draw(st.integers(0, 999)))
    shape = draw(st.tuples(st.integers(0, 6), st.integers(0, 6)))
    array = random.random(shape) < draw(st.sampled_from([0.2, 0.5, 0.9, 1.0]))
    block = draw(st.tuples(sizes, sizes))
    return Case(masks.Blocks(array, block), oracle.blocks(array, block))


tokens_per_frame = st.integers(1, 12)
sinks = st.integers(0, 3)
paper = st.builds(_case(masks.Radial, oracle.radial), tokens_per_frame, sinks)
blocked = st.builds(
    _case(masks.Radial, oracle.radial),
    tokens_per_frame,
    sinks,
    st.sampled_from([0.3, 0.5, 1.0, 2.0]),
    st.sampled_from([0, 1, 2, 3, 4, 7, 16]),
    st.just("pow2"),
)
radial = paper | blocked
starts = st.integers(0, 40)


def global_tokens(start, width):
    stop = None if width is None else start + width
    return Case(masks.GlobalTokens(start, stop), oracle.global_tokens(start, stop))


PRIMITIVES = {
    "All": st.builds(lambda: Case(masks.All(), lambda q, k: True)),
    "Causal": st.builds(_case(masks.Causal, oracle.causal), st.integers(-9, 9)),
    "Window": st.builds(_case(masks.Window, oracle.window), reach, reach),
    "Dilated": st.builds(_case(masks.Dilated, oracle.dilated), sizes),
    "Chunked": st.builds(_case(masks.Chunked, oracle.chunked), sizes),
    "Prefix": st.builds(_case(masks.Prefix, oracle.prefix), starts),
    "GlobalTokens": st.builds(global_tokens, starts, reach),
    "Blocks": block_masks(),
    "Radial": radial,
}
primitives = st.one_of(*PRIMITIVES.values())


def both(left: Case, right: Case) -> Case:
    return Case(
        left.mask & right.mask, lambda q, k: left.keeps(q, k) and right.keeps(q, k)
    )


def either(left: Case, right: Case) -> Case:
    return Case(
        left.mask | right.mask, lambda q, k: left.keeps(q, k) or right.keeps(q, k)
    )


def opposite(case: Case) -> Case:
    return Case(~case.mask, lambda q, k: not case.keeps(q, k))


def shifted(case: Case, query: int, key: int) -> Case:
    return Case(
        case.mask.shift(query, key), lambda q, k: case.keeps(q + query, k + key)
    )


offsets = st.integers(-9, 20)
simple_compositions = (
    primitives
    | st.builds(opposite, primitives)
    | st.builds(shifted, primitives, offsets, offsets)
)
compositions = st.recursive(
    simple_compositions,
    lambda inner: st.builds(both, inner, inner) | st.builds(either, inner, inner),
    max_leaves=4,
)
