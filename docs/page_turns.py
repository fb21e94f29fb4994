"""Pages that a build executes, where it does not execute all of them, as in CI."""

import pathlib

from tests import selection

DOCS = pathlib.Path(__file__).parent


def executable() -> list[str]:
    """Pages that hold cells, as paths below docs/."""
    return sorted(
        str(path.relative_to(DOCS))
        for path in DOCS.rglob("*.md")
        if "_build" not in path.parts and "\n```{code-cell}" in path.read_text()
    )


def left_out(every: int, offset: int) -> list[str]:
    """Pages that wait for another of `every` offsets in a row, which execute all.

    Args:
        every: One in so many pages is executed.
        offset: Which ones: the number of commits, say.
    """
    pages = executable()
    due = selection.slice_of(map(selection.Case, pages), every, offset)
    return sorted({*pages} - {case.name for case in due})
