"""Radial attention: vectors, closed forms, far positions, the public code, kernels."""

import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from benchmarks import radial_density
from softlib import masks
from softlib.masks import _radial_bands, _radial_blocks
from tests.host import jnp
from tests.masks import random_masks
from tests.oracles import masks as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def vectors():
    return np.load(DATA / "radial_attention_case0.npz")


def unpacked(bits: np.ndarray, columns: int) -> np.ndarray:
    return np.unpackbits(bits, axis=1)[:, :columns].astype(bool)


def half_widths(mask: masks.Radial, count: int) -> np.ndarray:
    return _radial_bands.widths(mask._bands(), count).dropping[:count]


def test_vectors(vectors):
    frames, tokens = int(vectors["in_frames"]), int(vectors["in_tokens_per_frame"])
    sinks, block = int(vectors["in_sink_frames"]), int(vectors["in_block"])
    mask, length = masks.Radial(tokens, sinks), frames * tokens
    expected = unpacked(vectors["out_mask"], length)
    np.testing.assert_array_equal(mask.materialize(length), expected)
    traced = jax.jit(
        lambda: mask(jnp.arange(length)[:, None], jnp.arange(length)[None])
    )
    np.testing.assert_array_equal(traced(), expected)
    np.testing.assert_array_equal(
        half_widths(mask, 200), vectors["out_halfwidth_d0_199"]
    )
    count = masks.radial_pair_count(frames, tokens, sink_frames=sinks)
    assert count == vectors["out_count"]
    assert type(count) is int
    found = masks.block_map(mask, (length, length), (block, block))
    np.testing.assert_array_equal(found, vectors["out_block_status"])


def test_vectors_of_the_public_code(vectors):
    wan = masks.radial_block_mask(9, 300, block=32)
    expected = vectors["out_code_block_wan_f9_s300_b32"]
    np.testing.assert_array_equal(wan, unpacked(expected, 84))
    hunyuan = masks.radial_block_mask(12, 200, block=16, decay=0.5, variant="hunyuan")
    expected = vectors["out_code_block_hunyuan_f12_s200_b16_g05"]
    np.testing.assert_array_equal(hunyuan, unpacked(expected, 150))
    one = masks.radial_block_mask(1, 128, block=129)  # no text by default
    assert one.shape == (0, 0)
    expected = vectors["out_code_halfwidth_s256g1_s256g05_s1560_s3600"]
    cases = ((256, 1.0), (256, 0.5), (1560, 1.0), (3600, 1.0))
    for column, (tokens, decay) in enumerate(cases):
        found = [_radial_blocks._half_width(d, tokens, 128, decay) for d in range(64)]
        np.testing.assert_array_equal(found, expected[:, column])


@pytest.mark.parametrize(
    ("frames", "tokens", "block", "decay", "variant", "text"),
    [
        (1, 128, 16, 1.0, "wan", 0),
        (7, 131, 24, 1.0, "wan", 0),  # a third of 24 rows is a whole number
        (6, 140, 30, 0.5, "hunyuan", 77),  # 60 % of 30 columns is one, too
        (5, 129, 35, 2.0, "wan", 50),
        (9, 160, 64, 1.0, "hunyuan", 1),
        (3, 128, 256, 1.0, "wan", 0),  # blocks larger than a frame
    ],
)
def test_block_mask_is_that_of_token_masks_on_canvases(
    frames, tokens, block, decay, variant, text
):
    found = masks.radial_block_mask(
        frames, tokens, block=block, decay=decay, variant=variant, text_tokens=text
    )
    expected = oracle.public_code_blocks(frames, tokens, block, decay, variant, text)
    np.testing.assert_array_equal(found, expected)


POINTS = 400


@settings(max_examples=40)
@given(case=random_masks.radial, seed=st.integers(0, 999), exponent=st.integers(4, 29))
def test_far_positions(case, seed, exponent):
    """Distances of up to 2^29 frames, places near to each other."""
    random = np.random.default_rng(seed)
    tokens = case.mask.tokens_per_frame
    query = random.integers(0, 2**exponent, POINTS)
    distance = random.integers(0, 2**exponent // tokens, POINTS) * tokens
    # Multiples of large powers of two, which are not dropped.
    distance[::2] &= ~(2 ** (exponent // 2) - 1)
    key = query // tokens * tokens + distance + random.integers(0, tokens, POINTS)
    expected = [case.keeps(int(q), int(k)) for q, k in zip(query, key, strict=True)]
    if exponent < 22:
        np.testing.assert_array_equal(case.mask(query, key), expected)
    traced = case.mask(jnp.asarray(query), jnp.asarray(key))
    np.testing.assert_array_equal(traced, expected)


@pytest.mark.parametrize("options", [{}, {"rule": "pow2", "min_window": 128}])
@pytest.mark.parametrize("tokens", [1560, 3600, 4096, 50_000])
def test_large_frames(tokens, options):
    mask = masks.Radial(tokens, **options)
    keeps = oracle.radial(tokens, **options)
    random = np.random.default_rng(tokens)
    query, key = random.integers(0, 2**30, (2, POINTS))
    key[::2] = query[::2] + tokens * random.integers(0, 200, len(query[::2]))
    key[::2] += random.integers(-300, 300, len(query[::2]))
    expected = [keeps(int(q), int(k)) for q, k in zip(query, key, strict=True)]
    assert 0 < sum(expected) < POINTS
    np.testing.assert_array_equal(mask(query, key), expected)
    with jax.enable_x64():
        np.testing.assert_array_equal(
            mask(jnp.asarray(query), jnp.asarray(key)), expected
        )
    np.testing.assert_array_equal(mask(jnp.asarray(query), jnp.asarray(key)), expected)


@settings(max_examples=60)
@given(case=random_masks.radial, frames=st.integers(0, 40))
def test_pair_count_is_the_sum_of_row_counts(case, frames):
    mask = case.mask
    tokens, *options = (
        getattr(mask, name)
        for name in ("tokens_per_frame", "sink_frames", "decay", "min_window", "rule")
    )
    names = ("sink_frames", "decay", "min_window", "rule")
    count = masks.radial_pair_count(
        frames, tokens, **dict(zip(names, options, strict=True))
    )
    length = frames * tokens
    assert count == mask.row_count(length).sum(dtype=int)
    if length < 60:
        assert count == oracle.dense(case.keeps, range(length), range(length)).sum()


def test_pair_count_of_a_video():
    """Row counts and pair count are two derivations; one value counted by hand."""
    count = masks.radial_pair_count(128, 3600)
    assert count == masks.Radial(3600).row_count(128 * 3600).sum(dtype=int)
    # Two frames are neighbours: everything.
    assert masks.radial_pair_count(2, 3600) == 7200**2
    # A third adds two pairs of frames at distance 2, where |k - l| <= 1799; one of
    # them has the key in the sink.
    band = 3600 * 3599 - 1799 * 1800
    assert masks.radial_pair_count(3, 3600) == 8 * 3600**2 + band
    assert masks.radial_pair_count(0, 3600) == 0


def test_octaves_have_the_density_of_two_sided_bands():
    tokens = 4096
    widths = half_widths(masks.Radial(tokens), 64)
    for octave in range(1, 6):
        width, power = int(widths[2**octave]), 2**octave
        kept = tokens * (2 * width + 1) - width * (width + 1)
        expected = 2 / power - 1 / power**2
        assert kept / tokens**2 == pytest.approx(expected, abs=2 / tokens)


def test_bands_of_a_frame_count():
    """sign(j - i) r takes 2 ceil(log2 max(f, 2)) - 1 values; f occurs nowhere else."""
    for frames in range(1, 300):
        octaves = {d.bit_length() - 1 for d in range(1, frames)}
        bands = {0} | {s * r for r in octaves for s in (-1, 1)}
        assert len(bands) == 2 * (max(frames, 2) - 1).bit_length() - 1


def test_block_aware_rule_keeps_neighbouring_frames_of_few_tokens():
    """The rule of the public code would drop them: its least run is 128 tokens."""
    mask = masks.Radial(40, sink_frames=0, min_window=128, rule="pow2")
    assert mask.materialize(80).all()
    assert half_widths(mask, 4).tolist() == [39, 39, -1, -1]


def test_text_sees_and_is_seen_by_everything():
    tokens, video, length = 6, 30, 41
    mask = (masks.Radial(tokens) & ~masks.GlobalTokens(video)) | masks.GlobalTokens(
        video
    )
    found = mask.materialize(length)
    assert found[video:].all()
    assert found[:, video:].all()
    np.testing.assert_array_equal(
        found[:video, :video], masks.Radial(tokens).materialize(video)
    )


def test_no_row_is_empty():
    for tokens in (1, 3, 8):
        assert (masks.Radial(tokens, 0).row_count(97) > 0).all()


def test_one_frame_is_dense_and_a_last_frame_may_be_short():
    assert masks.Radial(7).materialize(7).all()
    whole, short = masks.Radial(7).materialize(70), masks.Radial(7).materialize(66)
    np.testing.assert_array_equal(short, whole[:66, :66])


def test_density_table():
    """Rows that the table of the documentation shows."""
    video = radial_density.VIDEOS[0]
    found = radial_density.density(video.frames, video.tokens, radial_density.BLOCK)
    assert [round(value, 3) for value in found] == [0.413, 0.473, 0.303, 0.362]
    assert round(radial_density.public_code_tokens(video), 3) == 0.277
    assert round(radial_density.public_code_blocks(video), 3) == 0.291


@pytest.mark.slow
def test_whole_density_table():
    table = "\n".join(radial_density.lines())
    for row in (
        "64 | 3600 | hunyuan | 0.256 | 0.320 | 0.179 | 0.234 | 0.166 | 0.178 | 0.192",
        "128 | 3600 | hunyuan | 0.158 | 0.224 | 0.107 | 0.148 | 0.100 | 0.109 | 0.117",
        "41 | 3600 | wan | 0.342 | 0.404 | 0.246 | 0.305 | 0.246 | 0.260 | 0.264",
        "256 | 256 | 64 | 0.091 | 0.635 | 0.091 | 0.120",
        "1024 | 256 | 64 | 0.028 | 0.385 | 0.030 | 0.040",
    ):
        assert row in table


def test_blocks_of_narrow_bands_are_not_fewer():
    """Token-exact bands touch every frame pair; the block-aware rule does not."""
    found = radial_density.density(128, 64, 32)
    assert found.paper_tokens < 0.2
    assert found.paper_blocks > 0.55
    assert found.pow2_blocks < 0.25
