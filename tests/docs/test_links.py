"""Pages point at files and tests that exist; Sphinx checks the links between pages."""

import re

import pytest

from tests.docs import cited

# Written by the build of the documentation or by a program, not kept in the repository.
GENERATED = ("docs/_build",)


@pytest.mark.parametrize(
    "page", cited.PAGES, ids=lambda page: str(page.relative_to(cited.ROOT))
)
def test_what_a_page_points_at_exists(page):
    text = page.read_text()
    wrong = [
        complaint
        for path, test in cited.paths(text)
        if not path.startswith(GENERATED) and (complaint := cited.missing(path, test))
    ]
    for target in cited.links(text):
        if not (page.parent / target).exists():
            wrong.append(f"link to {target}")
    assert wrong == []


def test_the_pages_with_links_are_looked_at():
    names = {str(page.relative_to(cited.ROOT)) for page in cited.PAGES}
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md"} <= names
    assert cited.links((cited.ROOT / "README.md").read_text())


# ------------------------------------------------------------------- the finder itself
PAGE = """
See [the rules](CONTRIBUTING.md#commits), ![a
picture](docs/images/demo.png), [above](#here), [jax](https://docs.jax.dev) and
`[no](link.md)`, shown by `tests/test_a.py::test_b`, `softlib/losses` and `x/y`.

```python
a[0](no.md)
```

```{include} ../README.md
```
"""


def test_links_and_paths_are_found():
    assert cited.links(PAGE) == [
        "CONTRIBUTING.md",
        "docs/images/demo.png",
        "../README.md",
    ]
    assert cited.paths(PAGE) == [
        ("tests/test_a.py", "test_b"),
        ("softlib/losses", None),
    ]


@pytest.mark.parametrize(
    ("path", "test", "complaint"),
    [
        ("tests/docs/test_links.py", "test_links_and_paths_are_found", None),
        ("tests/docs/*.py", None, None),
        ("tests/docs", None, None),
        ("tests/docs/absent.py", None, "tests/docs/absent.py does not exist"),
        (
            "tests/docs/test_links.py",
            "test_x",
            "tests/docs/test_links.py has no function test_x",
        ),
    ],
)
def test_what_is_missing_is_named(path, test, complaint):
    assert cited.missing(path, test) == complaint


def test_every_page_of_the_documentation_is_in_a_table_of_contents():
    """The build refuses one that is not, after minutes."""
    docs = cited.ROOT / "docs"
    entries = set()
    for page in docs.rglob("*.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S):
            lines = [line for line in tree.splitlines() if line and line[0] != ":"]
            entries |= {(page.parent / line.strip()).resolve() for line in lines}
    pages = {page.resolve().with_suffix("") for page in docs.rglob("*.md")}
    pages = {page for page in pages if "_build" not in page.parts}
    assert len(entries) > 50
    assert pages - entries == {(docs / "index").resolve()}
