"""Writes the table of `docs/papers/index.md`: which files and functions a paper became.

Public docstrings name their papers in the section Source, by the full title in quotes.
A page of `docs/papers` belongs to the papers whose titles it has.

    python -m scripts.paper_index  # after a change of a Source
"""

import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import softlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAPERS = ROOT / "docs/papers"
INDEX = PAPERS / "index.md"
BEGIN = "<!-- Written by scripts/paper_index.py from the docstrings. -->\n"
END = "<!-- End of what scripts/paper_index.py has written. -->\n"

_SOURCE = re.compile(r"^Source: (.*(?:\n.+)*)", re.MULTILINE)
_AS = re.compile(r"^as `(\w+)`")


class Code(NamedTuple):
    """A public function or class.

    Attributes:
        address: Where users find it, as `softlib.losses.z_loss`.
        role: What Sphinx calls it.
        file: Where its text is, from the root of the repository.
    """

    address: str
    role: str
    file: str

    @property
    def link(self) -> str:
        return f"{{{self.role}}}`~{self.address}`"


def source_of(docstring: str | None) -> str:
    """Returns the section Source of a docstring as one line, or nothing."""
    found = _SOURCE.search(inspect.cleandoc(docstring or ""))
    return " ".join(found[1].split()) if found else ""


def titles_in(source: str) -> list[str]:
    """Returns the titles of papers that a section Source names."""
    return re.findall(r'"([^"]+)"', re.sub(r"`[^`]*`", "", source))


def public_values() -> Iterator[tuple[str, Any]]:
    """Pairs of an address and a function or class, the shortest address of each."""
    below = (module.name for module in pkgutil.iter_modules(softlib.__path__))
    packages = ["softlib", *(f"softlib.{name}" for name in below if name[0] != "_")]
    seen: set[int] = set()
    for package in packages:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            is_code = inspect.isclass(value) or inspect.isroutine(value)
            if is_code and id(value) not in seen:
                seen.add(id(value))
                yield f"{package}.{name}", value


def papers() -> dict[str, list[Code]]:
    """Returns what each paper became, by its title, in the order of titles."""
    found: dict[str, list[Code]] = {}
    sources = {address: source_of(v.__doc__) for address, v in public_values()}
    for address, value in public_values():
        source, package = sources[address], address.rpartition(".")[0]
        if match := _AS.match(source):
            source = sources[f"{package}.{match[1]}"] + source
        file = inspect.getsourcefile(inspect.unwrap(value))
        assert file is not None
        path = str(pathlib.Path(file).resolve().relative_to(ROOT))
        role = "class" if inspect.isclass(value) else "func"
        for title in dict.fromkeys(titles_in(source)):
            found.setdefault(title, []).append(Code(address, role, path))
    return {title: found[title] for title in sorted(found, key=str.lower)}


def pages_of(title: str) -> list[str]:
    """Returns the names of the pages that say something about a paper."""
    words = re.compile(rf"(?<!\w){re.escape(_plain(title))}(?!\w)")
    return [name for name, text in _pages().items() if words.search(text)]


@functools.cache
def _pages() -> dict[str, str]:
    pages = sorted(set(PAPERS.glob("*.md")) - {INDEX})
    return {page.name: _plain(page.read_text()) for page in pages}


def table() -> str:
    lines = ["| paper | files | functions |", "| --- | --- | --- |"]
    for title, codes in papers().items():
        first, *others = pages_of(title) or [None]
        paper = f"[{title}]({first})" if first else title
        paper += "".join(f", [](./{page})" for page in others)
        files = sorted({f"`{code.file}`" for code in codes})
        links = ", ".join(code.link for code in codes)
        lines.append(f"| {paper} | {', '.join(files)} | {links} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """Returns the text of the page with the table as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{INDEX} has no place for the table"
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _plain(text: str) -> str:
    """The words, without case, lines and marks of Markdown."""
    return " ".join(re.sub(r'[*$"`\\]', "", text).split()).lower()


def main() -> int:
    INDEX.write_text(with_table(INDEX.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
