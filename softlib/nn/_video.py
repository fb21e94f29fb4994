"""A transformer block for video: radial attention over frames and places."""

import functools
import math
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks, masks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.attention import dot_product_attention
from softlib.masks import Mask
from softlib.typing import Implementations, Precision

from ._attention import require_static_mask, static_names


class VideoTransformerBlock(nnx.Module):
    r"""Attention between the patches of a video, then a two-layer network per patch.

    $x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x))$, then
    $x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x))$: a pre-norm block. Queries and
    keys are normalised per head and rotated by frame, row and column. Attention thins
    with the distance between frames, so that the pairs that are left grow as
    $\mathrm{frames} \log \mathrm{frames}$ at a fixed size of the frame.

    Bidirectional as it stands, for masked patches; `is_causal` hides later frames, for
    next-frame prediction. The number of frames of a call is free. All projections are
    `nnx.Linear`, so that `nnx.LoRA` can wrap them:
    `block.query = nnx.LoRA(features, rank, features, base_module=block.query, rngs=r)`.

    Args:
        features: Size D of a token.
        heads: Query heads; divides `features`, with a head size that is even and at
            least 6 for rotary positions.
        grid: Rows and columns of patches in a frame; their product is the number of
            places.
        mask: Static mask value on positions `frame * places + place`, without arrays;
            `masks.All()` for dense attention. None for
            `masks.Radial(places, rule="pow2", min_window=w)`, w a quarter of the
            places rounded down to a power of two, at least 1 and at most 128. With 4
            places or more it drops no frame nearer than 8.
        is_causal: Static; whether a frame sees only itself and earlier frames.
        mlp_features: Hidden size of the two-layer network; None for `4 * features`.
        key_value_heads: Heads of keys and values; divides `heads`. None for as many.
        positions: Static; `rotary` rotates pairs of features of queries and keys, a
            third of the pairs, rounded down, by row, as many by column, and the rest by
            frame; None leaves positions to the caller, see `VideoPositions`.
        rotary_base: Static, positive; of n pairs, pair i turns by
            `rotary_base ** (-i / n)` radians per step.
        normalize_qk: Whether queries and keys are divided by their root mean square,
            with learned factors.
        dtype: Dtype of the computation; None for that of tokens and parameters.
        param_dtype: Dtype of the parameters.
        precision: Of the matrix products.
        implementation: Of the attention; see `softlib.explain`.
        rngs: Key source of the parameters.

    Raises:
        TypeError: An argument has the wrong type, or `mask` holds arrays.
        ValueError: Sizes do not divide, or an option is out of range.

    Attributes:
        mask: The static mask in use, `is_causal` included.

    Derivatives: as `softlib.attention.dot_product_attention`, in the parameters and the
        tokens.
    Cost: that of the blocks that the mask leaves, see `softlib.attention.block_plan`;
        and $8 D^2 + 4 D \cdot$ `mlp_features` flop per token for the projections (with
        as many key heads as query heads).
    Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long
        Video Generation" for the mask; "Scaling Vision Transformers to 22 Billion
        Parameters" for normalised queries and keys, here by their root mean square
        without centring; "RoFormer: Enhanced Transformer
        with Rotary Position Embedding", here one axis of the video after the other.

    Example:
        >>> Block = softlib.nn.VideoTransformerBlock
        >>> block = Block(32, 4, grid=(4, 6), rngs=nnx.Rngs(0))
        >>> tokens = jnp.ones((2, 5, 24, 32))
        >>> print(block(tokens).shape, block(tokens.reshape(2, 120, 32)).shape)
        (2, 5, 24, 32) (2, 120, 32)
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        grid: tuple[int, int],
        mask: Mask | None = None,
        is_causal: bool = False,
        mlp_features: int | None = None,
        key_value_heads: int | None = None,
        positions: Literal["rotary"] | None = "rotary",
        rotary_base: float = 100.0,
        normalize_qk: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Precision = None,
        implementation: Implementations = None,
        rngs: nnx.Rngs,
    ):
        name = "VideoTransformerBlock"
        key_heads = heads if key_value_heads is None else key_value_heads
        hidden = 4 * features if mlp_features is None else mlp_features
        for option, size in (
            ("features", features),
            ("heads", heads),
            ("key_value_heads", key_heads),
            ("mlp_features", hidden),
        ):
            checks.require_positive_integer(name, option, size)
        _require_multiple(name, "features", features, "heads", heads)
        _require_multiple(name, "heads", heads, "key_value_heads", key_heads)
        checks.require_one_of(name, "positions", positions, ("rotary", None))
        checks.require_positive_number(name, "rotary_base", rotary_base)
        head_size = features // heads
        if positions == "rotary" and (head_size % 2 or head_size < 6):
            raise ValueError(
                f"{name}: `features // heads` must be even and at least 6 for rotary "
                f"positions of three axes, got {head_size}."
            )
        self.grid = _checked_grid(name, grid)
        places = self.grid[0] * self.grid[1]
        self.mask = _static_mask(name, mask, places, is_causal)
        self.heads, self.key_value_heads = heads, key_heads
        self.positions, self.rotary_base = positions, float(rotary_base)
        self.precision, self.implementation = precision, static_names(implementation)

        own: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        products = {**own, "precision": precision}
        linear = functools.partial(nnx.Linear, **products)
        self.attention_norm = nnx.LayerNorm(features, **own)
        self.query = linear(features, heads * head_size)
        self.key = linear(features, key_heads * head_size)
        self.value = linear(features, key_heads * head_size)
        self.out = linear(heads * head_size, features)
        self.query_norm = nnx.RMSNorm(head_size, **own) if normalize_qk else None
        self.key_norm = nnx.RMSNorm(head_size, **own) if normalize_qk else None
        self.mlp_norm = nnx.LayerNorm(features, **own)
        self.mlp_in = linear(features, hidden)
        self.mlp_out = linear(hidden, features)

    @array_arguments
    def __call__(
        self,
        tokens: Float[Array, "*batch D"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
    ) -> Float[Array, "*batch D"]:
        """Returns the tokens after the block, in their shape and dtype.

        Args:
            tokens: `(batch, frames, places, D)` or `(batch, frames * places, D)`,
                places row by row.
            mask: What must hold besides the mask of the block: a mask value, which may
                hold arrays (`masks.Padding`, `masks.Segments`), or a boolean array
                that broadcasts to `(batch, heads, tokens, tokens)`. A token that may
                attend to nothing has the attended value 0.

        Raises:
            ValueError: The tokens are not whole frames of the grid.
        """
        flat, frames = self._flat(tokens)
        update = self._attend(self.attention_norm(flat), frames, mask)
        flat = flat + update.astype(flat.dtype)
        update = self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(flat))))
        return (flat + update.astype(flat.dtype)).reshape(tokens.shape)

    def _flat(self, tokens: Array) -> tuple[Array, int]:
        name, places = "VideoTransformerBlock", self.grid[0] * self.grid[1]
        if tokens.ndim not in (3, 4):
            raise ValueError(
                f"{name}: `tokens` must have axes (batch, frames, places, features) or "
                f"(batch, frames * places, features), got shape {tokens.shape}."
            )
        batch, *positions, features = tokens.shape
        if positions[-1] != places and (len(positions) == 2 or positions[0] % places):
            raise ValueError(
                f"{name}: `tokens` must hold whole frames of {places} places, got "
                f"shape {tokens.shape}."
            )
        length = math.prod(positions)
        return tokens.reshape(batch, length, features), length // places

    def _attend(self, tokens: Array, frames: int, mask: Any) -> Array:
        def of_heads(linear: Any, heads: int, norm: Any = None) -> Array:
            x = linear(tokens)
            x = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
            return x if norm is None else norm(x)

        query = of_heads(self.query, self.heads, self.query_norm)
        key = of_heads(self.key, self.key_value_heads, self.key_norm)
        value = of_heads(self.value, self.key_value_heads)
        if self.positions == "rotary":
            grid = (frames, *self.grid)
            query = _rotated(query, grid, self.rotary_base)
            key = _rotated(key, grid, self.rotary_base)
        attended: Any = dot_product_attention(
            query,
            key,
            value,
            mask=self.mask if mask is None else (self.mask, mask),
            precision=self.precision,
            implementation=self.implementation,
        )
        *positions, heads, head_size = attended.shape
        return self.out(attended.reshape(*positions, heads * head_size))


class VideoPositions(nnx.Module):
    """Adds learned positions to the tokens of a video: frame plus row plus column.

    Three tables instead of one of all positions. Apply it once, to the embedded
    patches; blocks then take `positions=None`, or rotate on top.

    Args:
        features: Size D of a token.
        grid: Frames, rows and columns. Frames is the largest number of a call.
        init_scale: Standard deviation of the initial tables.
        param_dtype: Dtype of the tables.
        rngs: Key source of the tables.

    Raises:
        TypeError: A size is no Python int.
        ValueError: A size is not positive.

    Attributes:
        frame: Table of the first axis, (frames, D).
        row: Table of the second.
        column: Table of the third.

    Derivatives: linear in the tables and the tokens.
    Cost: one addition per number.
    Source: the tables of "ViViT: A Video Vision Transformer", one per axis.

    Example:
        >>> positions = softlib.nn.VideoPositions(32, grid=(8, 4, 6), rngs=nnx.Rngs(0))
        >>> print(positions(jnp.zeros((2, 5, 24, 32))).shape)
        (2, 5, 24, 32)
    """

    def __init__(
        self,
        features: int,
        *,
        grid: tuple[int, int, int],
        init_scale: float = 0.02,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.grid = _checked_grid("VideoPositions", grid, 3)
        init = nnx.initializers.normal(init_scale)

        def table(length: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (length, features), param_dtype))

        self.frame, self.row, self.column = map(table, self.grid)

    @array_arguments
    def __call__(
        self, tokens: Float[Array, "batch frames places D"]
    ) -> Float[Array, "batch frames places D"]:
        """Returns the tokens plus their positions, in the dtype of the tokens.

        Args:
            tokens: Places row by row; the first frame is frame 0.

        Raises:
            ValueError: There are more frames than the table has, or other places.
        """
        most, rows, columns = self.grid
        frames, places = tokens.shape[1:3]
        if frames > most or places != rows * columns:
            raise ValueError(
                f"VideoPositions: `tokens` must have at most {most} frames of "
                f"{rows * columns} places, got shape {tokens.shape}."
            )
        row, column = self.row[...][:, None], self.column[...][None, :]
        shape = (places, tokens.shape[-1])
        place = (row + column).reshape(shape)[None, None]
        position = self.frame[...][None, :frames, None] + place
        return tokens + position.astype(tokens.dtype)


def _rotated(x: Array, grid: tuple[int, int, int], base: float) -> Array:
    """Rotates pairs of features by frame, row and column; (B, tokens, heads, H)."""
    pairs = x.shape[-1] // 2
    of_space = pairs // 3
    counts = (pairs - 2 * of_space, of_space, of_space)
    wide = accumulator_dtype(x)
    split = x.astype(wide).reshape(x.shape[0], *grid, x.shape[2], 2, pairs)
    rotated, start = [], 0
    for axis, (length, count) in enumerate(zip(grid, counts, strict=True)):
        frequency = base ** (-jnp.arange(count, dtype=wide) / count)
        angle = jnp.arange(length, dtype=wide)[:, None] * frequency[None, :]
        shape = [1, 1, 1, 1, 1, count]
        shape[1 + axis] = length
        cos, sin = (f(angle).reshape(shape) for f in (jnp.cos, jnp.sin))
        real, imaginary = (split[..., i, start : start + count] for i in (0, 1))
        rotated.append(
            jnp.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -2)
        )
        start += count
    return jnp.concatenate(rotated, -1).reshape(x.shape).astype(x.dtype)


def _static_mask(name: str, mask: Any, places: int, is_causal: bool) -> Mask:
    if mask is None:
        window = min(128, max(1, (1 << (places.bit_length() - 1)) // 4))
        mask = masks.Radial(places, rule="pow2", min_window=window)
    require_static_mask(name, mask)
    if is_causal:  # earlier tokens, and the whole of the own frame
        mask = mask & (masks.Causal() | masks.Chunked(places))
    return mask


def _checked_grid(name: str, grid: Any, axes: int = 2) -> Any:
    what = {2: "(rows, columns)", 3: "(frames, rows, columns)"}[axes]
    if not isinstance(grid, tuple | list) or len(grid) != axes:
        raise ValueError(f"{name}: `grid` must be {what}, got {grid!r}.")
    for size in grid:
        checks.require_positive_integer(name, "grid", size)
    return tuple(grid)


def _require_multiple(name: str, what: str, size: int, of: str, divisor: int) -> None:
    if size % divisor:
        raise ValueError(
            f"{name}: `{what}` must be a multiple of `{of}`, got {size} and {divisor}."
        )
