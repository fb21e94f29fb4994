"""Every entry of softlib in the feature table names tests that exist."""

import re

from tests.docs import cited

PAGE = (cited.ROOT / "docs/feature-table.md").read_text()
DEFECTS = "## Defects"


def rows(markdown: str) -> list[list[str]]:
    """Cells of the tables in a text, without the lines of headings and rules."""
    found: list[list[str]] = []
    previous = ""
    for line in markdown.split("\n"):
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if set(cells[0]) <= set("-: "):
                found.pop()  # the heading
            else:
                found.append(cells)
        previous = line
    assert previous == "", "the page must end with a line feed"
    return found


def footnotes() -> dict[str, list[tuple[str, str | None]]]:
    """Cited tests by the name of the footnote."""
    texts = re.findall(r"^\[\^(\w+)\]: (.*?)(?=^\[\^|\Z)", PAGE, re.M | re.S)
    return {name: cited.paths(text) for name, text in texts}


def test_every_feature_names_the_tests_that_prove_it():
    features = rows(PAGE.partition(DEFECTS)[0] + "\n")
    assert len(features) > 20
    notes = footnotes()
    used = set()
    for cells in features:
        assert len(cells) == 7, cells
        feature, ours = cells[:2]
        names = re.findall(r"\[\^(\w+)\]", ours)
        assert names or ours == "no", f"{feature}: no footnote with tests"
        for name in names:
            assert notes.get(name), f"{feature}: footnote {name} cites no test"
            used.add(name)
    assert used == notes.keys()


def test_every_defect_is_guarded_by_a_test_of_its_own():
    defects = rows(PAGE.partition(DEFECTS)[2])
    assert len(defects) > 10
    guard = "tests/losses/test_known_defects.py"
    for where, what, guarded in defects:
        tests = cited.paths(guarded)
        assert tests, f"{where}: {what}"
        assert all(path == guard and test for path, test in tests), where


def test_every_known_defect_is_on_the_page():
    text = (cited.ROOT / "tests/losses/test_known_defects.py").read_text()
    written = set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))
    listed = {test for _, test in cited.paths(PAGE.partition(DEFECTS)[2])}
    assert written <= listed


def test_all_cited_tests_exist():
    wrong = [cited.missing(path, test) for path, test in cited.paths(PAGE)]
    assert [complaint for complaint in wrong if complaint] == []
    assert len(wrong) > 50
