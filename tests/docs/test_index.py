"""The first page of the documentation opens with what the README opens with."""

import re

from tests.docs import cited

README = (cited.ROOT / "README.md").read_text()
INDEX = (cited.ROOT / "docs/index.md").read_text()


def test_it_says_what_the_library_is_in_the_same_words():
    opening = README.partition("\n- **")[0]
    assert opening.startswith("# softlib\n\n")
    assert INDEX.startswith(opening)


def test_it_installs_in_the_same_way_and_shows_the_same_picture():
    (install,) = re.findall(r"^pip install .*$", README, re.M)
    assert f"```bash\n{install}\n```" in INDEX
    picture = lambda text: re.findall(r"!\[[^]]*\]", text)
    assert picture(INDEX) == picture(README)
    places = [INDEX.index(x) for x in (install, "```python", "![", "| you want to")]
    assert places == sorted(places)


def test_its_lists_of_pages_are_in_the_sidebar_only():
    lists = re.findall(r"```\{toctree\}\n(.*?)```", INDEX, re.S)
    assert len(lists) > 5
    assert all(":hidden:" in each for each in lists)
