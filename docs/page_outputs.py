"""Looks at what the executed cells of a page show to its readers."""

import re
from collections.abc import Iterator
from typing import Any

# A line that says no more than this. `print(a < b)` tells a reader nothing where it
# holds, and less where it does not.
_BARE = re.compile(r"(array\()?\[*\s*((False|None|-?nan|-?inf),?\s*)+\]*\)?")


def complaint(output: str) -> str | None:
    """What is wrong with the text that a cell prints; None if nothing is."""
    if not output.strip():
        return "prints nothing visible"
    for line in output.splitlines():
        if _BARE.fullmatch(line.strip()):
            return f"prints {line.strip()!r} and says not of what"
    return None


def printed(page: Any) -> Iterator[Any]:
    """The nodes with printed text in a page that MyST-NB has executed."""
    for node in page.findall():
        if getattr(node, "attributes", {}).get("nb_element") == "cell_code_output":
            yield from (n for n in node.findall() if n.tagname == "literal_block")
