"""Finds and runs the Python blocks of a Markdown file, as one program.

A block marked `text` that follows a Python block, with nothing but blank lines between,
is what that block prints.
"""

import contextlib
import dataclasses
import io
import re
from typing import Any

_FENCE = re.compile(
    r"^```(?P<language>python|text|\{code-cell\})[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# The options that MyST-NB reads from the first lines of a cell.
_CELL_OPTIONS = re.compile(r"\A(?:---\n.*?^---\n|(?::[^\n]*\n)+)", re.M | re.S)


@dataclasses.dataclass(frozen=True)
class Block:
    source: str
    first_line: int
    output: str | None  # None: not compared


def blocks(markdown: str) -> list[Block]:
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(markdown):
        adjacent = not markdown[end : match.start()].strip()
        end = match.end()
        text = match["text"]
        if match["language"] == "text":
            if found and adjacent and found[-1].output is None:
                found[-1] = dataclasses.replace(found[-1], output=text)
            continue
        options = _CELL_OPTIONS.match(text)
        skipped = options.end() if options and match["language"] != "python" else 0
        line = markdown.count("\n", 0, match.start("text") + skipped) + 1
        found.append(Block(text[skipped:], line, None))
    return found


def run(markdown: str, filename: str) -> list[str]:
    """What the blocks print, run in one namespace; tracebacks point into the file."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for block in blocks(markdown):
        source = "\n" * (block.first_line - 1) + block.source
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, filename, "exec"), namespace)
        outputs.append(printed.getvalue())
        if block.output is not None:
            actual = outputs[-1].rstrip()
            assert actual == block.output.rstrip(), (
                f"{filename}:{block.first_line}: prints\n{actual}\n"
                f"and the file says\n{block.output}"
            )
    return outputs
