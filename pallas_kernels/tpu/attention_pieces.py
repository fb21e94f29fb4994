"""The pieces of a block, and the walk over them.

A piece is some rows of a tile of scores by some of its columns. It goes through three
stages: products make its scores, vector instructions make weights of them, and
products sum up what is weighted. What a stage leaves lies in vector memory, because
the scores of a piece are more than all registers hold. Each stage is cut into as many
parts as the piece has groups of columns, and one turn of a loop does a part of the
third stage of one piece, of the second stage of the next, and of the first stage of
the one after: the matrix units and the vector units then have work at the same time.
A loop, because a straight program of a piece would be scheduled with more values alive
than there are registers.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax
from jax.experimental import pallas as pl

# Rows that are turned into weights at a time: what a register of bfloat16 holds.
SLICE = 16

# Of a buffer (0 or 1), the first row and column of a piece, and the number of a part.
type Stage = Callable[[int, tuple[Any, Any], Any], None]


def over_pieces(
    block: tuple[int, int],
    piece: tuple[int, int],
    parts: int,
    overlapped: bool,
    stages: Sequence[Sequence[Stage]],
    before_last: Stage | None = None,
) -> None:
    """Takes every piece of a block through the stages, all rows of a column first.

    Args:
        block: Rows and columns.
        piece: Divides it.
        parts: Of each stage.
        overlapped: Whether successive pieces are in successive stages at the same time,
            with a buffer for either of two; else one piece is finished before the next.
        stages: In their order, each of one function or of several that do not depend
            on one another; these share a loop only where pieces overlap.
        before_last: All parts of this come before the last stage of the same piece.
    """
    counts = tuple(whole // part for whole, part in zip(block, piece, strict=True))
    pieces = counts[0] * counts[1]

    def run(work: list[tuple[Stage, int, tuple[Any, Any]]]) -> None:
        def part(i: Any, _: None) -> None:
            for stage, buffer, at in work:
                stage(buffer, at, i)

        lax.fori_loop(0, parts, part, None)

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
    """A start that is known to be a multiple of the size."""
    return start if isinstance(start, int) else pl.multiple_of(start, size)


def part_of(start: Any, i: Any, size: int) -> Any:
    """The i-th part of so many from `start` on, itself a multiple of the size."""
    return pl.ds(aligned(start + i * size, size), size)


def over_slices(
    piece: tuple[int, int],
    parts: int,
    start: Any,
    i: Any,
    straight: bool,
    body: Callable[[Any, Any, Any], None],
    width: int | None = None,
) -> None:
    """`body` of every slice of the i-th part of the rows of a piece.

    It gets the columns, and the rows in the piece and in the block, where the piece
    starts at `start`. `straight` as a straight program, which leaves the order of the
    instructions of all slices open; else in a loop, which keeps alive what one of them
    needs. `width`: columns of a slice, None for all.
    """
    share, width = piece[0] // parts, width or piece[1]
    size, groups = min(SLICE, share), piece[1] // width

    def one(n: Any, _: None = None) -> None:
        row, group = (n, 0) if groups == 1 else (lax.div(n, groups), lax.rem(n, groups))
        offset = aligned(i * share + row * size, size)
        rows = pl.ds(offset, size), pl.ds(aligned(start + offset, size), size)
        body(part_of(0, group, width), *rows)

    count = share // size * groups
    if straight:
        for n in range(count):
            one(n)
    else:
        lax.fori_loop(0, count, one, None)


def by_buffer(refs: Sequence[Any], buffers: int) -> list[Sequence[Any]]:
    """References, each once per buffer."""
    return [refs[i : i + buffers] for i in range(0, len(refs), buffers)]
