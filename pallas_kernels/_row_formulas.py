"""Operands and formulas of row statistics that the kernels of all devices share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Operands(NamedTuple):
    """The arrays of a call.

    Attributes:
        hidden: (N, D).
        weight: (V, D), or in the layout that the options of the kernel name.
        labels: (N, L) int32, or None; a label outside [0, V) is in no class.
        per_row: Numbers of every row, (N,) each, by name: `scale`, `temperature`.
        per_class: Numbers of every class, (V,) each: `bias`, and `where`, which is 0
            for a class that is not selected.
    """

    hidden: jax.Array
    weight: jax.Array
    labels: jax.Array | None
    per_row: dict[str, jax.Array]
    per_class: dict[str, jax.Array]


def state_names(statistics: tuple[str, ...], labels: int) -> tuple[str, ...]:
    """Names of the per-row numbers that the forward pass carries from tile to tile."""
    names: list[str] = []
    if "lse" in statistics or "mean_logit" in statistics:
        names += ["top", "total"]
    if "mean_logit" in statistics:
        names.append("weighted")
    names += [n for n in ("sum_logits", "sum_squared_logits") if n in statistics]
    if "max_logit" in statistics or "argmax" in statistics:
        names.append("max_logit")
    if "argmax" in statistics:
        names.append("argmax")
    if "label_logits" in statistics:
        names += [f"label_{i}" for i in range(labels)]
    return tuple(names)


def cotangent_of_logits(piece: Any, z: Any, p: Any, labels: int) -> Any:
    """The cotangent of z, with p its softmax and m the mean logit, term by term.

    p (g_lse + g_mean (1 + z - m)) + g_sum + 2 g_squared z + sum of g_label onehot.

    Args:
        piece: A slice; its `per_row(name)` broadcasts to z, and is None for a statistic
            without a cotangent.
        z: Logits.
        p: Their softmax, or None if neither lse nor mean_logit has a cotangent.
        labels: Number of labels with a cotangent.
    """
    g = lambda name: piece.per_row(f"g_{name}")
    dz: Any = None
    if g("lse") is not None or g("mean_logit") is not None:
        factor = g("lse")
        if g("mean_logit") is not None:
            deviation = 1 + without_inf(z) - piece.per_row("mean_logit")
            more = g("mean_logit") * deviation
            factor = more if factor is None else factor + more
        # p is exactly 0 where a class is excluded, but 0 * inf would be NaN.
        dz = piece.select(p * factor, 0)
    sums = g("sum_logits")
    if g("sum_squared_logits") is not None:
        twice = 2 * g("sum_squared_logits") * without_inf(z)
        sums = twice if sums is None else sums + twice
    if sums is not None:
        sums = piece.select(jnp.broadcast_to(sums, z.shape), 0)
        dz = sums if dz is None else dz + sums
    for i in range(labels):
        onehot = jnp.where(piece.label(i), g(f"label_{i}"), 0)
        dz = onehot if dz is None else dz + onehot
    return jnp.zeros_like(z) if dz is None else dz


def without_inf(z: Any) -> Any:
    return jnp.where(z == -jnp.inf, 0, z)
