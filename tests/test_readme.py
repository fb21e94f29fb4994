import pathlib
import re

import jax
import pytest

from docs.page_outputs import complaint
from tests import markdown_code

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("[!_]*/*.md")),
        ROOT / "docs/index.md",
    ]
    if markdown_code.blocks(page.read_text())
}
# Building the documentation runs these as well.
EXECUTED = [page for page, text in PAGES.items() if "file_format: mystnb" in text]


def test_the_readme_has_code():
    assert "README.md" in PAGES


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page in EXECUTED else page
        for page in PAGES
    ],
)
def test_code_blocks_run_and_print_what_the_page_says(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # As a reader has it: JAX's defaults, softlib's own errors.
    with jax.numpy_rank_promotion("allow"):
        outputs = markdown_code.run((ROOT / page).read_text(), page)
    wrong = [found for text in outputs if text and (found := complaint(text))]
    assert wrong == []


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_commands_of_the_readme_exist(command):
    target = command.removeprefix("make ")
    assert f"\n{target}: " in (ROOT / "Makefile").read_text()
    assert command in (ROOT / "README.md").read_text()


def commands(text: str) -> set[str]:
    """Targets of make that a text names in code."""
    return set(re.findall(r"(?:`|^)make\s+([a-z-]+)", text, re.M))


def test_every_command_that_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = commands((ROOT / "README.md").read_text())
    assert {"demo", "test", "bench", "docs"} <= named
    assert [name for name in named if f"\n{name}: " not in makefile] == []


def test_the_commands_of_the_claims_are_run_by_ci():
    claims = re.findall(r"^\|.*", (ROOT / "README.md").read_text(), re.M)
    claims = [line for line in claims if "`tests/" in line or "the same" in line]
    assert len(claims) > 8
    script = (ROOT / ".ci/run").read_text()
    for line in claims:
        named = commands(line.rstrip(" |").rpartition("|")[2])
        assert named, line
        assert all(f"make {name}" in script for name in named), line


# ------------------------------------------------------------------- the runner itself
PAGE = """Text

```python
x = 1
print(x)
```

```text
1
```

```text
not the output of anything
```

```{code-cell} python
:tags: [hide-input]

y = x + 1
```

```bash
rm -rf everything
```
"""


def test_blocks_share_a_namespace_and_know_their_output():
    first, second = markdown_code.blocks(PAGE)
    assert (first.source, first.first_line, first.output) == (
        "x = 1\nprint(x)\n",
        4,
        "1\n",
    )
    assert second.source.strip() == "y = x + 1"
    assert PAGE.split("\n")[second.first_line :][0] == "y = x + 1"
    assert markdown_code.run(PAGE, "page.md") == ["1\n", ""]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("print(x)", "print(x + 1)", AssertionError),
        ("y = x", "y = z", NameError),
        ("x = 1", "x = ", SyntaxError),
    ],
)
def test_a_block_that_does_not_hold_fails(old, new, error):
    with pytest.raises(error):
        markdown_code.run(PAGE.replace(old, new), "page.md")
