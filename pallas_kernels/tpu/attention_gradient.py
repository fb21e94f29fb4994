"""Code that the kernels of both gradients of attention share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .attention_form import Form
from .attention_pieces import chunk_of
from .attention_tiles import LANES
from .attention_weights import LOG2_E


def flat(mask_scalars: jax.Array | None) -> list[jax.Array]:
    return [] if mask_scalars is None else [mask_scalars.reshape(-1)]


def inputs(
    form: Form,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    inverse: jax.Array,
    delta: jax.Array,
) -> list[jax.Array]:
    """Transposes to the kernels' layout: (B, N, T, H), numbers per row (B, N, 1, T)."""
    if form.weights.is_log:
        inverse = inverse * LOG2_E
    per_row = lambda x: jnp.swapaxes(x, 1, 2)[:, :, None]
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (query, key, value, cotangent)]
    return [*heads_first, per_row(inverse), per_row(delta)]


def store(out_ref: Any, sum_ref: Any, factor: float) -> None:
    def store_rows(i: Any, _: None) -> None:
        rows = chunk_of(0, i, LANES)
        out_ref[rows, :] = (sum_ref[rows, :] * factor).astype(out_ref.dtype)

    lax.fori_loop(0, sum_ref.shape[0] // LANES, store_rows, None)


def weights_and_slopes(form: Form, z: Any, ok: Any, inverse: Any) -> tuple[Any, Any]:
    """The weights and their slopes, both 0 where the pair does not attend."""
    weights = form.weights
    e = weights.entries(z)
    if ok is not None:
        e = jnp.where(ok, e, weights.absent)
    p = weights.of_entries(e, inverse)
    slope = weights.slopes(z, p, inverse)
    if ok is not None and slope is not p:
        slope = jnp.where(ok, slope, 0.0)
    return p, slope
