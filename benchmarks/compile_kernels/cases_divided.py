"""Everyday programs of four devices: arrays that lie on a mesh, then `jax.jit`.

Rows, batch entries or heads are divided, and nothing of them may be gathered. On
Explicit axes each device runs kernels on its part; on Auto axes the compiler divides
plain JAX, since it cannot divide a kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from softlib import LinearLogits, attention, losses, masks, softmax

from .case import Case, Division, array

FAMILY = "several devices"
_TARGETS = ("v5e", "h100")
# Of one device, since the compiler counts its memory.
_DEVICES = 4


def cases() -> list[Case]:
    rows, heads, same = P("device"), P(None, None, "device"), P()
    sums = frozenset({"all-reduce"})
    hidden = array(jnp.bfloat16, 4096, 1024)
    weight = array(jnp.bfloat16, 32_000, 1024)
    labels = array(jnp.int32, 4096)
    head = (hidden, weight, labels)
    logits = (array(jnp.bfloat16, 4096, 32_768),)
    queries = (array(jnp.bfloat16, 8, 1024, 8, 128),) * 3
    by_rows, by_heads = (rows,) * 3, (heads,) * 3
    programs: list[tuple[str, Any, Any, Any, Any]] = [
        ("loss and gradients, rows", _training, head, (rows, same, rows), sums),
        ("softmax and logsumexp, rows", _softmax, logits, (rows,), frozenset()),
        ("attention, batch", _attention, queries, by_rows, frozenset()),
        ("attention, heads", _attention, queries, by_heads, frozenset()),
        ("gradients of attention, batch", _gradients, queries, by_rows, frozenset()),
        ("gradients of attention, heads", _gradients, queries, by_heads, frozenset()),
    ]
    return [
        Case(
            FAMILY,
            f"{name}, {kind} axis",
            function,
            arguments,
            _TARGETS,
            plain=_TARGETS if kind == "Auto" else (),
            division=Division(kind, specs, needed, _DEVICES),
        )
        for name, function, arguments, specs, needed in programs
        for kind in ("Explicit", "Auto")
    ]


def _training(hidden: Any, weight: Any, labels: Any) -> Any:
    loss = lambda h, w: losses.softmax_cross_entropy(LinearLogits(h, w), labels).mean()
    return jax.value_and_grad(loss, (0, 1))(hidden, weight)


def _softmax(logits: Any) -> Any:
    return softmax.softmax(logits), softmax.logsumexp(logits)


def _attention(query: Any, key: Any, value: Any) -> Any:
    return attention.dot_product_attention(query, key, value, mask=masks.Causal())


def _gradients(*arrays: Any) -> Any:
    squares = lambda *a: (_attention(*a).astype(jnp.float32) ** 2).sum()
    return jax.grad(squares, (0, 1, 2))(*arrays)
