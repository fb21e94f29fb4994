"""Recurrent forms, decoding and small attention against the same in plain JAX.

`python -m benchmarks.sequences` prints a table; `--quick` with small shapes.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from softlib import attention, masks, recurrent

from .measure import machine, prepare, ratio, take_turns
from .report import table

CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Line:
    """A function of softlib and its peer.

    Attributes:
        name: What is computed.
        peer: By what else.
        own: softlib's function of the arrays.
        other: The peer's.
        shapes: Of the arrays.
        gradients: Whether there is a backward pass to measure.
    """

    name: str
    peer: str
    own: Callable[..., Any]
    other: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    gradients: bool = True


def sequential_scan(u, delta, A, B, C):
    """The definition of the selective scan as one loop over time."""

    def step(state, now):
        u, delta, B, C = now
        added = (delta * u)[..., None] * B[..., None, :]
        state = jnp.exp(-delta[..., None] * A[None]) * state + added
        return state, jnp.einsum("bdf,bf->bd", state, C)

    start = jnp.zeros((u.shape[0], *A.shape))
    sequence = (jnp.moveaxis(x, 1, 0) for x in (u, delta, B, C))
    return jnp.moveaxis(lax.scan(step, start, tuple(sequence))[1], 0, 1)


def chunked_linear_attention(query, key, value):
    """Quadratic inside of chunks, a state between them, recomputed backward."""
    batch, length, heads, _ = query.shape
    query, key = (jax.nn.elu(x) + 1 for x in (query, key))
    seen = jnp.tri(CHUNK)[None, None]

    def cut(x):
        chunks = x.reshape(batch, length // CHUNK, CHUNK, heads, -1)
        return jnp.moveaxis(chunks, (1, 3), (0, 2))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, chunk):
        (memory, total), (query, key, value) = state, chunk
        weights = jnp.matmul(query, key.swapaxes(-1, -2)) * seen
        out = jnp.matmul(weights, value) + jnp.matmul(query, memory)
        sums = weights.sum(-1) + jnp.matmul(query, total[..., None])[..., 0]
        memory += jnp.matmul(key.swapaxes(-1, -2), value)
        return (memory, total + key.sum(-2)), out / sums[..., None]

    features, size = query.shape[-1], value.shape[-1]
    start = (
        jnp.zeros((batch, heads, features, size)),
        jnp.zeros((batch, heads, features)),
    )
    _, out = lax.scan(step, start, tuple(map(cut, (query, key, value))))
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, length, heads, size)


def radial(query, key, value):
    mask = masks.Radial(1024)
    return attention.dot_product_attention(query, key, value, mask=mask)


def _scan(u, delta, A, B, C):
    positive = (jax.nn.softplus(delta), jnp.exp(A))
    return recurrent.selective_scan(u, *positive, B, C)


def _plain_scan(u, delta, A, B, C):
    return sequential_scan(u, jax.nn.softplus(delta), jnp.exp(A), B, C)


def lines(quick: bool) -> list[Line]:
    time, cache, video = (256, 1024, 2048) if quick else (2048, 65_536, 16_384)
    own, plain = attention.dot_product_attention, jax.nn.dot_product_attention
    one, keys = (1, 1, 8, 64), (1, cache, 8, 64)
    small = (16, 64, 4, 32)
    tokens = (2, time, 4, 64)
    found = [
        Line(
            "selective_scan",
            "sequential scan",
            _scan,
            _plain_scan,
            (*((2, time, 256),) * 2, (256, 16), *((2, time, 16),) * 2),
        ),
        Line(
            "linear_attention",
            "chunks by hand",
            recurrent.linear_attention,
            chunked_linear_attention,
            (tokens,) * 3,
        ),
        Line(
            "dot_product_attention, causal, small",
            "jax.nn",
            functools.partial(own, is_causal=True),
            functools.partial(plain, is_causal=True),
            (small,) * 3,
        ),
        Line(
            f"dot_product_attention, 1 query, {cache} keys",
            "jax.nn",
            own,
            plain,
            (one, keys, keys),
            False,
        ),
        Line(
            f"decode_attention, {cache} keys",
            "jax.nn",
            attention.decode_attention,
            plain,
            (one, keys, keys),
            False,
        ),
    ]
    for heads in (1, 4):
        shape = (1, video, heads, 64)
        name = f"Radial(1024), {video} tokens, {heads} heads"
        found.append(Line(name, "no mask", radial, own, (shape,) * 3))
    # Frames narrower than the blocks, of which few are empty; and a long video.
    for length, tokens in ((video // 4, 256), (4 * video, 1024)):
        narrow = functools.partial(own, mask=masks.Radial(tokens))
        name = f"Radial({tokens}), {length} tokens, 1 head"
        shapes = ((1, length, 1, 64),) * 3
        found.append(Line(name, "no mask", narrow, own, shapes, gradients=False))
    return found


def arrays(line: Line) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(line.shapes))
    pairs = zip(keys, line.shapes, strict=True)
    return [jax.random.normal(key, shape) for key, shape in pairs]


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    def program(*arrays):
        total = lambda *arrays: (function(*arrays) ** 2).sum()
        return jax.value_and_grad(total, tuple(range(len(arrays))))(*arrays)

    return program


def measured(line: Line, rounds: int) -> list[str]:
    """A row of the table: time by the peer's, forward and with gradients."""
    given, cells = arrays(line), [line.name, line.peer]
    for wrap in (lambda f: f, with_gradients):
        if wrap is with_gradients and not line.gradients:
            cells.append("-")
            continue
        own, other = (prepare(wrap(f), *given).call for f in (line.own, line.other))
        seconds = take_turns({"own": own, "other": other}, rounds=rounds).seconds
        found = ratio(seconds["own"], seconds["other"])
        cells.append(f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})")
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    known = machine()
    print(f"{known['cores']} cores of {known['device']}; jax {known['jax']}.\n")
    rows = (measured(line, options.rounds) for line in lines(options.quick))
    head = ["what", "against", "x, forward", "x, with gradients"]
    print(table(head, rows), end="")


if __name__ == "__main__":
    main()
