"""The video block against NumPy, and what its mask and its positions promise."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from softlib import masks
from softlib.nn import VideoPositions, VideoTransformerBlock
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles import video_block as oracle

GRID, D, HEADS = (2, 3), 32, 4
PLACES = GRID[0] * GRID[1]


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def made(**options) -> Any:
    """A block whose parameters are all drawn, so that none of them is 0 or 1."""
    given: dict[str, Any] = {"grid": GRID, **options}
    make = lambda: VideoTransformerBlock(D, HEADS, **given, rngs=nnx.Rngs(0))
    # NumPy draws, because the initialisers would be compiled shape by shape.
    block, rng = nnx.eval_shape(make), np.random.default_rng(7)

    def parameter(leaf):
        mean, scale = (0.7, 0.2) if leaf.ndim == 1 else (0.0, leaf.shape[0] ** -0.5)
        return jnp.asarray(rng.normal(mean, scale, leaf.shape), leaf.dtype)

    nnx.update(block, jax.tree.map(parameter, nnx.state(block)))
    return block


@nnx.jit
def call(block, tokens, mask=None):
    return block(tokens, mask=mask)


# Static mask, and options that the oracle is told too.
BLOCKS = {
    "default": {},
    "causal_grouped": {"is_causal": True, "key_value_heads": 2, "mlp_features": 20},
    "dense_plain": {
        "mask": masks.All(),
        "positions": None,
        "normalize_qk": False,
    },
    "window": {"mask": masks.Window(4, 2), "rotary_base": 10.0},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_the_oracle(name):
    options: dict[str, Any] = BLOCKS[name]
    frames = 9  # a frame is dropped at a distance of 8
    with jax.enable_x64():
        block = made(param_dtype=jnp.float64, **options)
        tokens = draw(1, frames, PLACES, D, dtype=jnp.float64)
        found = call(block, tokens)
    # The mask from what is documented.
    mask = options.get("mask", masks.Radial(PLACES, rule="pow2", min_window=1))
    dense = mask.materialize(frames * PLACES).copy()
    if options.get("is_causal"):
        frame = np.arange(frames * PLACES) // PLACES
        dense &= frame[None, :] <= frame[:, None]
    expected = in_numpy(block, tokens[0], dense, **options)
    assert found.dtype == jnp.float64
    assert_close(found[0], expected, dtype="float64", length=frames * PLACES * D, c=8)


def in_numpy(block, tokens, dense, **options):
    state = nnx.to_pure_dict(nnx.state(block, nnx.Param))
    rotated = options.get("positions", "rotary") is not None
    found = oracle.block(
        np.asarray(tokens, np.float64).reshape(-1, D),
        jax.tree.map(lambda x: np.asarray(x, np.float64), state),
        heads=HEADS,
        key_heads=options.get("key_value_heads", HEADS),
        grid=GRID,
        mask=dense,
        base=options.get("rotary_base", 100.0) if rotated else None,
    )
    return found.reshape(tokens.shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_is_near_float64(dtype):
    block, tokens = made(dtype=dtype), draw(2, 3, PLACES, D, dtype=dtype)
    with jax.enable_x64():
        wide = made(param_dtype=jnp.float64)
        state = jax.tree.map(lambda x: x.astype(jnp.float64), nnx.state(block))
        nnx.update(wide, state)
        expected = call(wide, tokens.astype(jnp.float64))
    found = call(block, tokens)
    assert found.dtype == dtype
    assert_close(found, expected, dtype=dtype, length=3 * PLACES * D)


def test_gradients_have_the_dtype_of_the_parameters():
    block, tokens = made(dtype=jnp.bfloat16), draw(2, 3, PLACES, D, dtype=jnp.bfloat16)
    loss = lambda block: block(tokens).astype(jnp.float32).sum()
    found = jax.tree.leaves(nnx.eval_shape(nnx.grad(loss), block))
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float32")}


def test_gradients_equal_those_of_dense_attention_under_the_mask_as_an_array():
    sparse, dense = made(is_causal=True), made(mask=masks.All())
    tokens = draw(1, 3, PLACES, D)
    array = jnp.asarray(sparse.mask.materialize(3 * PLACES))[None, None]

    def gradient(block, mask):
        weight = jnp.sin(jnp.arange(tokens.size)).reshape(tokens.shape)
        loss = lambda tokens: (block(tokens, mask=mask) * weight).sum()
        return jax.jit(jax.grad(loss))(tokens)

    found, expected = gradient(sparse, None), gradient(dense, array)
    assert_close(found, expected, dtype="float32", length=tokens.size)


def test_a_token_depends_on_those_that_its_mask_names():
    frames = 4
    block = made(is_causal=True)
    tokens = draw(frames * PLACES, D)
    summed = lambda tokens: block(tokens[None])[0] @ draw(D, seed=1)
    by_token = jnp.abs(jax.jit(jax.jacrev(summed))(tokens)).sum(-1) > 0
    mask = block.mask.materialize(frames * PLACES)
    np.testing.assert_array_equal(by_token, mask)
    frame = np.arange(frames * PLACES) // PLACES
    assert not mask[frame[:, None] < frame[None, :]].any()
    assert mask[frame[:, None] == frame[None, :]].all()


@pytest.mark.parametrize(
    ("grid", "window"),
    [((1, 1), 1), ((2, 3), 1), ((8, 8), 16), ((9, 9), 16), ((45, 80), 128)],
)
def test_default_mask_is_radial_and_near_frames_are_not_dropped(grid, window):
    places = grid[0] * grid[1]
    expected = masks.Radial(places, rule="pow2", min_window=window)
    assert made(grid=grid).mask == expected
    if 4 <= places < 1024:
        same_place = expected(np.array([[0]]), places * np.arange(2, 10)[None, :])
        # Frame 0 is a sink: ask for a query in frame 0 and keys after it.
        assert same_place[0].tolist() == [True] * 7 + [False]


def test_both_layouts_are_one_and_the_number_of_frames_is_free():
    block = made()
    tokens = draw(2, 3, PLACES, D)
    flat = tokens.reshape(2, 3 * PLACES, D)
    np.testing.assert_array_equal(
        call(block, tokens), call(block, flat).reshape(tokens.shape)
    )
    for frames in (0, 1, 20):
        more = draw(2, frames, PLACES, D)
        found = jax.eval_shape(lambda x: block(x), more)
        assert (found.shape, found.dtype) == (more.shape, more.dtype)


def test_rotary_positions_are_relative():
    block = made(mask=masks.All())
    tokens = draw(1, 3, PLACES, D)
    visible = jnp.arange(3 * PLACES) >= PLACES
    later = call(block, tokens, visible[None, None, None])[:, 1:]
    alone = call(block, tokens[:, 1:])
    assert_close(later, alone, dtype="float32", length=2 * PLACES * D)
    swapped = tokens[:, [0, 2, 1]]
    apart = call(block, swapped)[:, [0, 2, 1]] - call(block, tokens)
    assert float(jnp.abs(apart).max()) > 0.01, "without positions it would be 0"


def test_mask_of_the_call_is_anded_and_empty_rows_attend_to_nothing():
    block = made()
    tokens = draw(2, 3, PLACES, D)
    lengths = jnp.array([3 * PLACES, 2 * PLACES])
    padded = tokens.at[1, 2].set(1e3)
    mask = masks.Padding(query=lengths, key=lengths)
    found = call(block, padded, mask)
    rest = found[1, :2]
    assert_close(
        rest, call(block, tokens[1:, :2])[0], dtype="float32", length=2 * PLACES * D
    )
    nothing = call(block, tokens, jnp.zeros((1, 1, 1, 3 * PLACES), bool))
    expected = in_numpy(block, tokens[1], np.zeros((3 * PLACES,) * 2, bool))
    assert_close(nothing[1], expected, dtype="float32", length=4 * D)


def test_lora_wraps_the_projections():
    block = made(key_value_heads=2)
    tokens = draw(2, 2, PLACES, D)
    before = call(block, tokens)
    sizes = {"query": D, "key": D // 2, "value": D // 2, "out": D}
    for name, size in sizes.items():
        base = getattr(block, name)
        lora = nnx.LoRA(D, 2, size, base_module=base, rngs=nnx.Rngs(1))
        setattr(block, name, lora)

    @nnx.jit
    def gradient(block, tokens):
        def loss(block):
            out = block(tokens)
            return (out**2).sum(), out

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        return nnx.grad(loss, argnums=wrt, has_aux=True)(block)

    found, out = gradient(block, tokens)
    np.testing.assert_allclose(out, before, atol=1e-5)
    assert len(jax.tree.leaves(found)) == 2 * len(sizes)
    assert all(jnp.abs(found[name]["lora_b"][...]).max() > 0 for name in sizes)


@pytest.mark.slow
def test_masked_patches_are_learnt():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.positions = VideoPositions(D, grid=(4, *GRID), rngs=rngs)
            self.block = VideoTransformerBlock(D, HEADS, grid=GRID, rngs=rngs)

        def __call__(self, tokens):
            return self.block(self.positions(tokens))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    # Every frame of a video is the same, so a hidden patch is seen in other frames.
    video = jnp.broadcast_to(draw(4, 1, PLACES, D), (4, 4, PLACES, D))
    hidden = jnp.asarray(np.random.default_rng(1).random((4, 4, PLACES, 1)) < 0.3)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            found = model(jnp.where(hidden, 0, video))
            return jnp.where(hidden, (found - video) ** 2, 0).sum() / hidden.sum() / D

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    values = [float(step(model, optimizer)) for _ in range(60)]
    assert values[-1] < 0.5 * values[0]


def test_positions_are_frame_plus_row_plus_column():
    positions = VideoPositions(D, grid=(4, *GRID), rngs=nnx.Rngs(0))
    frame, row, column = (
        np.asarray(table[...])
        for table in (positions.frame, positions.row, positions.column)
    )
    tokens = draw(2, 3, PLACES, D)
    found = positions(tokens) - tokens
    for f, place in [(0, 0), (2, 4), (1, 5)]:
        r, c = divmod(place, GRID[1])
        expected = frame[f] + row[r] + column[c]
        assert_close(found[1, f, place], expected, dtype="float32", length=3)
    assert positions(tokens.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_errors_name_what_is_wrong(untyped):
    def error(kind, match, features=D, heads=HEADS, **options):
        given: dict[str, Any] = {"grid": GRID, "rngs": nnx.Rngs(0), **options}
        with pytest.raises(kind, match=match):
            VideoTransformerBlock(features, heads, **given)

    error(ValueError, "`features` must be a multiple of `heads`, got 30 and 4", 30)
    error(
        ValueError,
        "`heads` must be a multiple of `key_value_heads`",
        heads=4,
        key_value_heads=3,
    )
    error(ValueError, "must be even and at least 6 .* got 4", 16)
    error(
        ValueError, r"`grid` must be \(rows, columns\), got \(2, 3, 4\)", grid=(2, 3, 4)
    )
    error(ValueError, "`grid` must be at least 1, got 0", grid=(0, 3))
    error(TypeError, "`mask` must hold no arrays", mask=masks.Padding(key=jnp.array(3)))
    error(TypeError, "`mask` must be a mask value", mask=jnp.ones((2, 2), bool))
    error(ValueError, "`positions` must be one of 'rotary', None", positions="learned")
    block = made()
    with pytest.raises(
        ValueError, match=r"whole frames of 6 places, got shape \(1, 7, 32\)"
    ):
        block(draw(1, 7, D))
    with pytest.raises(
        ValueError, match=r"`tokens` must have axes .* got shape \(6, 32\)"
    ):
        block(draw(6, D))
    positions = VideoPositions(D, grid=(2, *GRID), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"at most 2 frames of 6 places"):
        positions(draw(1, 3, PLACES, D))
