r"""Turns a docstring of softlib into reStructuredText for Sphinx's autodoc.

Docstrings are written in Markdown with `$...$` maths and sections such as `Args:` and
`Cost:`. Autodoc reads reStructuredText. The part of Markdown that docstrings use is
small: code spans and blocks, maths, emphasis, links and lists.
"""

import re

# Heading -> the field that reStructuredText has for each entry below it.
ENTRIES = {"Args": "param", "Attributes": "var", "Raises": "raises"}
TEXTS = {
    "Returns": "returns",
    "Derivatives": "Derivatives",
    "Cost": "Cost",
    "Source": "Source",
}
_HEADING = re.compile(rf"({'|'.join([*ENTRIES, *TEXTS, 'Example'])}):[ \t]*(.*)")
_ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*):\s*(.*)", re.DOTALL)
_LITERAL = re.compile(
    r"^(?P<indent>[ ]*)```(?P<language>\w*)\n(?P<block>.*?)^[ ]*```$"
    r"|(?P<doctest>^[ ]*>>>.*?(?=\n[ ]*\n|\Z))"
    r"|(?P<ticks>`+)(?P<code>.+?)(?P=ticks)"
    r"|\$\$(?P<display>.+?)\$\$"
    r"|\$(?P<math>[^$\n](?:[^$]*?[^$\s])?)\$",
    re.MULTILINE | re.DOTALL,
)
_INLINE = re.compile(
    r"\[(?P<label>[^\]]+)\]\((?P<url>[^)\s]+)\)"
    r"|(?<![\w*])(?P<stars>\*{1,2})(?=\S)[^*]+?(?<=\S)(?P=stars)(?![\w*])"
)
_ITEM = re.compile(r"\s*(?:[-*+]|\d+\.)\s")


def to_rest(docstring: str) -> str:
    """`docstring` without indentation, as `inspect.cleandoc` returns it."""
    prose, fields = [], []
    for heading, lines in _split(docstring.split("\n")):
        text = "\n".join(lines).strip("\n")
        if heading is None:
            prose.append(markup(text))
        elif heading == "Example":
            prose.append(f".. rubric:: Example\n\n{markup(text)}")
        elif heading in TEXTS:
            fields.append(_field(TEXTS[heading], markup(text)))
        else:
            for names, meaning in _entries(text):
                for name in names.split(", "):
                    field = f"{ENTRIES[heading]} {name.lstrip('*')}"
                    fields.append(_field(field, markup(meaning)))
    blocks = [prose[0], "\n".join(fields), *prose[1:]]
    return "\n\n".join(block for block in blocks if block) + "\n"


def markup(text: str) -> str:
    """Spans, maths, links, blocks and lists."""
    if re.search(r"^\s*\|.*\|\s*$", text, re.MULTILINE):
        raise ValueError("a docstring cannot hold a table: make it a list")
    pieces, end = [], 0
    for match in _LITERAL.finditer(text):
        pieces += [_prose(text[end : match.start()]), _literal(match)]
        end = match.end()
    return _spaced_lists("".join([*pieces, _prose(text[end:])]))


def _split(lines: list[str]):
    """(None or heading, lines without indentation), in the order of the text.

    A section whose text begins beside its heading goes on until an empty line or the
    next heading; one that begins below it goes on as long as lines are indented.
    """
    heading: str | None = None
    beside = False
    current: list[str] = []
    for line in lines:
        match = _HEADING.match(line)
        ends = not line if beside else line and not line.startswith(" ")
        if match or (heading and ends):
            yield heading, current
            heading, current = (match[1], [match[2]]) if match else (None, [line])
            beside = bool(match and match[2])
        else:
            current.append(line.removeprefix("    ") if heading else line)
    yield heading, current


def _entries(text: str):
    """`name: meaning`, where the lines that go on are indented."""
    # Several errors may share a line, two spaces apart.
    for part in re.split(r"\n(?=\S)|  (?=[A-Z]\w*Error: )", text):
        match = _ENTRY.match(part)
        if match is None:
            raise ValueError(f"an entry must be `name: meaning`, got {part!r}")
        lines = match[2].rstrip().split("\n")
        yield match[1], "\n".join(line.removeprefix("    ") for line in lines)


def _field(name: str, text: str) -> str:
    return f":{name}: " + text.replace("\n", "\n    ")


def _literal(match: re.Match[str]) -> str:
    if match["block"] is not None:
        lines = match["block"].removesuffix("\n").split("\n")
        body = "\n".join(f"   {line}" if line.strip() else "" for line in lines)
        language = match["language"] or "text"
        return f"\n{match['indent']}.. code-block:: {language}\n\n{body}\n"
    if match["doctest"] is not None:
        return match["doctest"]
    if match["code"] is not None:
        return f"``{match['code'].strip()}``{_glue(match)}"
    if match["display"] is not None:
        indent = re.search(r"[^\n]*\Z", match.string[: match.start()])
        space = indent[0] if indent and not indent[0].strip() else ""
        formula = " ".join(match["display"].split())
        return f"\n{space}.. math:: {formula}\n\n{space}"
    return f":math:`{match['math']}`{_glue(match)}"


def _glue(match: re.Match[str]) -> str:
    """What lets a word follow a span at once: `` `x`s ``."""
    following = match.string[match.end() : match.end() + 1]
    return r"\ " if following.isalnum() else ""


def _prose(text: str) -> str:
    """Links and emphasis stay; what only reStructuredText would read is escaped."""
    pieces, end = [], 0
    for match in _INLINE.finditer(text):
        link = match["label"] and f"`{match['label']} <{match['url']}>`__"
        pieces += [_escape(text[end : match.start()]), link or match[0]]
        end = match.end()
    return "".join([*pieces, _escape(text[end:])])


def _escape(text: str) -> str:
    text = re.sub(r"(?<=\w)\*|\*(?=\w)|\|", r"\\\g<0>", text)
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)


def _spaced_lists(text: str) -> str:
    """A list needs an empty line before its first item."""
    lines: list[str] = []
    for line in text.split("\n"):
        before = lines[-1] if lines else ""
        begins = _ITEM.match(line) and before.strip() and not _ITEM.match(before)
        if begins and not before.startswith(" "):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)
