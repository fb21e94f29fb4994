"""The pieces of a block, and the pipeline over them.

A piece is some rows of a tile of scores by some of its columns. It goes through three
stages: products compute its scores, vector instructions turn these into weights, and
products sum the weighted values. Results of a stage lie in vector memory, because the
scores of a piece exceed the registers. Each stage is cut into chunks, as many as the
piece has groups of columns. An iteration of the loop computes a chunk of the third
stage of one piece, of the second stage of the next, and of the first stage of the one
after: so matrix units and vector units work at the same time. Unrolled, a piece would
be scheduled with more live values than there are registers.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax
from jax.experimental import pallas as pl

# Rows that are turned into weights at a time: those of a register of bfloat16.
SLICE = 16

# Takes a buffer (0 or 1), the first row and column of a piece, and the chunk's index.
type Stage = Callable[[int, tuple[Any, Any], Any], None]


def over_pieces(
    block: tuple[int, int],
    piece: tuple[int, int],
    chunks: int,
    overlapped: bool,
    stages: Sequence[Sequence[Stage]],
    before_last: Stage | None = None,
) -> None:
    """Runs the stages on every piece of a block, all rows of a column first.

    Args:
        block: Rows and columns.
        piece: Rows and columns of a piece; divides `block`.
        chunks: Number of chunks of each stage.
        overlapped: Whether successive pieces are in successive stages at the same time,
            with two buffers; else one piece is finished before the next.
        stages: In order, each of one function or of several independent ones, which
            share a loop only if pieces overlap.
        before_last: Run with all its chunks before the last stage of the same piece.
    """
    counts = tuple(whole // size for whole, size in zip(block, piece, strict=True))
    pieces = counts[0] * counts[1]

    def run(work: list[tuple[Stage, int, tuple[Any, Any]]]) -> None:
        def chunk(i: Any, _: None) -> None:
            for stage, buffer, at in work:
                stage(buffer, at, i)

        lax.fori_loop(0, chunks, chunk, None)

    if not overlapped:

        def one(n: Any, _: None) -> None:
            column = lax.div(n, counts[0])
            row = n - column * counts[0]
            at = (aligned(row * piece[0], piece[0]), aligned(column * piece[1], 128))
            for number, stage in enumerate(stages):
                if number == len(stages) - 1 and before_last is not None:
                    run([(before_last, 0, at)])
                for function in stage:
                    run([(function, 0, at)])

        lax.fori_loop(0, pieces, one, None)
        return

    starts = [
        (row * piece[0], column * piece[1])
        for column in range(counts[1])
        for row in range(counts[0])
    ]
    for step in range(pieces + len(stages) - 1):
        work = [
            (function, n % 2, starts[n])
            for stage, n in zip(stages, range(step, -1, -1), strict=False)
            if n < pieces
            for function in stage
        ]
        if before_last is not None and step >= len(stages) - 1:
            run([(before_last, *work[-1][1:])])
        run(work)


def aligned(start: Any, size: int) -> Any:
    """`start`, which the compiler may assume to be a multiple of `size`."""
    return start if isinstance(start, int) else pl.multiple_of(start, size)


def chunk_of(start: Any, i: Any, size: int) -> Any:
    """The i-th slice of `size` from `start` on, which is a multiple of `size`."""
    return pl.ds(aligned(start + i * size, size), size)


def over_slices(
    piece: tuple[int, int],
    chunks: int,
    start: Any,
    i: Any,
    straight: bool,
    body: Callable[[Any, Any, Any], None],
    width: int | None = None,
) -> None:
    """Calls `body` for every slice of the i-th chunk of the rows of a piece.

    Its arguments are the columns, and the rows in the piece and in the block, in which
    the piece starts at `start`. `straight` unrolls, so that the compiler may interleave
    slices; in a loop only the values of one slice are live. `width`: columns of a
    slice, None for all.
    """
    length, width = piece[0] // chunks, width or piece[1]
    size, groups = min(SLICE, length), piece[1] // width

    def one(n: Any, _: None = None) -> None:
        row, group = (n, 0) if groups == 1 else (lax.div(n, groups), lax.rem(n, groups))
        offset = aligned(i * length + row * size, size)
        rows = pl.ds(offset, size), pl.ds(aligned(start + offset, size), size)
        body(chunk_of(0, group, width), *rows)

    count = length // size * groups
    if straight:
        for n in range(count):
            one(n)
    else:
        lax.fori_loop(0, count, one, None)


def by_buffer(refs: Sequence[Any], buffers: int) -> list[Sequence[Any]]:
    """The references of each buffer."""
    return [refs[i : i + buffers] for i in range(0, len(refs), buffers)]
