"""The table of papers has every paper that a docstring names, and files that exist."""

import re

import pytest

from scripts import paper_index
from tests import docstring_rules, public_names
from tests.docs import cited, test_feature_table

PAGE = paper_index.INDEX.read_text()
ROWS = {paper: cells for paper, *cells in test_feature_table.rows(PAGE + "\n")}


def sources() -> dict[str, str]:
    """The section Source of every public function and class that has one."""
    found = {}
    for public in public_names.public_names():
        section = docstring_rules.sections(public.value.__doc__ or "").get("Source")
        if section and public.value.__module__.startswith("softlib"):
            found[public.address] = " ".join(section.split())
    return found


def title_of(cell: str) -> str:
    """A cell of the first column, without its links to pages."""
    return re.sub(r"\]\([\w-]+\.md\)|^\[", "", cell)


def names_in(cell: str) -> list[str]:
    """Names of the functions in a cell of the third column."""
    return re.findall(r"\.(\w+)`", cell)


def test_the_table_is_current():
    message = "run `python -m scripts.paper_index`"
    assert paper_index.with_table(PAGE) == PAGE, message


def test_every_function_with_a_paper_is_in_its_row():
    functions = {title_of(paper): names_in(cells[1]) for paper, cells in ROWS.items()}
    wrong = [
        f"{address}: {title}"
        for address, source in sources().items()
        for title in paper_index.titles_in(source)
        if address.rpartition(".")[2] not in functions.get(title, ())
    ]
    assert wrong == []
    assert len(functions) > 60


@pytest.mark.parametrize("paper", ROWS)
def test_its_files_exist_and_hold_its_functions(paper):
    files, functions = ROWS[paper]
    paths = [path for path, _ in cited.paths(files)]
    assert paths
    text = "\n".join((cited.ROOT / path).read_text() for path in paths)
    names = names_in(functions)
    assert names
    for name in names:
        assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), name


def test_what_a_source_quotes_is_a_title():
    quoted = {t for s in sources().values() for t in paper_index.titles_in(s)}
    assert [title for title in quoted if len(title.split()) < 3] == []


def test_readme_leads_to_it():
    readme = (cited.ROOT / "README.md").read_text()
    assert "docs/papers/index.md" in cited.links(readme)


# ------------------------------------------------------------------- the parser itself
DOCSTRING = """Does something.

    Cost: "none".
    Source: "A Title of Three
        Lines", and `f(x="no title")`; else
        "Another: Title".

    Example:
        >>> "no source"
    """


def test_titles_are_found():
    source = paper_index.source_of(DOCSTRING)
    assert source.startswith('"A Title of Three Lines", and')
    titles = ["A Title of Three Lines", "Another: Title"]
    assert paper_index.titles_in(source) == titles
    assert paper_index.source_of(None) == paper_index.source_of("Says nothing.") == ""


def test_a_function_whose_source_is_that_of_another_is_in_its_row():
    found = paper_index.papers()
    (title,) = paper_index.titles_in(sources()["softlib.softmax.spherical_softmax"])
    assert "softlib.softmax.log_spherical_softmax" in [c.address for c in found[title]]
