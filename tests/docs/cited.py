"""What a page of Markdown points at in the repository: files, and tests in them."""

import ast
import functools
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for page in ROOT.glob(pattern)
    if "_build" not in page.parts
)
# A path from the root of the repository as inline code: `softlib/losses`; with
# wildcards, `tests/losses/*_promises.py`; or one test, `tests/test_x.py::test_y`.
_FOLDERS = "benchmarks|docs|examples|pallas_kernels|scripts|softlib|tests"
_PATH = re.compile(rf"`((?:{_FOLDERS})/[\w./*-]*)(?:::(\w+))?`")
_FENCE = re.compile(r"^(```+|~~~+|:::+).*?^\1$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_INCLUDE = re.compile(r"^```\{include\} (\S+)$", re.MULTILINE)


def paths(markdown: str) -> list[tuple[str, str | None]]:
    """Pairs of a path from the root and the name of a test in it, or None."""
    return [(match[1], match[2] or None) for match in _PATH.finditer(markdown)]


def links(markdown: str) -> list[str]:
    """Targets relative to the page, images and included files too, without anchors."""
    prose = _SPAN.sub("", _FENCE.sub("", markdown))
    found = [*_LINK.findall(prose), *_INCLUDE.findall(markdown)]
    external = re.compile(r"[a-z][a-z+.-]*:|#")  # an address, or a heading of the page
    return [target.partition("#")[0] for target in found if not external.match(target)]


def missing(path: str, test: str | None) -> str | None:
    """What is wrong with a pair of `paths`, or None."""
    if not any(ROOT.glob(path)):
        return f"{path} does not exist"
    if test is not None and test not in _tests(ROOT / path):
        return f"{path} has no function {test}"
    return None


@functools.cache
def _tests(file: pathlib.Path) -> frozenset[str]:
    body = ast.parse(file.read_text()).body
    functions = (node for node in body if isinstance(node, ast.FunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))
