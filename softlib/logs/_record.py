"""The record that everything about logs takes and returns: columns by template."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

WILDCARD = "<*>"


class Template(NamedTuple):
    """Messages of one kind: what they share, and a column for each thing that differs.

    Attributes:
        text: The constant text, with `<*>` for each parameter.
        rows: Numbers of its messages in the log, ascending, int64 of shape (n,).
        parameters: A column for each `<*>`: n strings, an object array.
    """

    text: str
    rows: np.ndarray
    parameters: tuple[np.ndarray, ...]


class ParsedLog(NamedTuple):
    """A log as columns.

    Attributes:
        templates: In the order of their first messages.
        template_ids: Of each of the N messages, int32: an index into `templates`.
        fields: What the program writes before the message (time, level, component), by
            its name: a column of N strings each, an object array.
    """

    templates: tuple[Template, ...]
    template_ids: np.ndarray
    fields: Mapping[str, np.ndarray]


def message_parameters(message: str, template: str) -> tuple[str, ...] | None:
    """The texts that stand for the `<*>` of a template in one message.

    Each is the shortest that leaves the rest a match, from the left.

    Args:
        message: One line.
        template: Constant text with `<*>` for each parameter.

    Returns:
        One text for each `<*>`, possibly empty; None if the message is not of that
        template.

    Example:
        >>> message, template = "got block b7 of size 91", "got block <*> of size <*>"
        >>> print(softlib.logs.message_parameters(message, template))
        ('b7', '91')
    """
    found = _pattern(template).fullmatch(message)
    return None if found is None else found.groups()


def log_of_templates(
    messages: Sequence[str],
    templates: Sequence[str],
    *,
    fields: Mapping[str, Sequence[str]] | None = None,
) -> ParsedLog:
    """The log of messages whose templates are known, as from a labelled data set.

    Args:
        messages: The N lines, without their fields.
        templates: The template of each, with `<*>` for its parameters.
        fields: Columns of N strings by name.

    Returns:
        The columns. A message that is not of its template gets the template `<*>`: no
        text is lost, and the label can be seen to be wrong.

    Raises:
        ValueError: Columns have different lengths.

    Example:
        >>> messages = ["user ann in", "user bob in", "bye"]
        >>> log = softlib.logs.log_of_templates(messages, ["user <*> in"] * 2 + ["bye"])
        >>> print([t.text for t in log.templates], log.templates[0].parameters[0])
        ['user <*> in', 'bye'] ['ann' 'bob']
    """
    columns = {"templates": templates, **(fields or {})}
    for name, column in columns.items():
        if len(column) != len(messages):
            raise ValueError(
                f"log_of_templates: `{name}` must have one entry for each of the "
                f"{len(messages)} messages, got {len(column)}."
            )
    texts, values = [], []
    for message, template in zip(messages, templates, strict=True):
        found = message_parameters(message, template)
        texts.append(template if found is not None else WILDCARD)
        values.append(found if found is not None else (message,))
    return log_of_rows(texts, values, fields or {})


def message_texts(log: ParsedLog) -> list[str]:
    """The messages of a log, in their order.

    Args:
        log: Columns by template.

    Returns:
        N strings.

    Example:
        >>> of = softlib.logs.log_of_templates
        >>> log = of(["a 1", "b", "a 2"], ["a <*>", "b", "a <*>"])
        >>> print(softlib.logs.message_texts(log))
        ['a 1', 'b', 'a 2']
    """
    texts: list[str] = [""] * len(log.template_ids)
    for template in log.templates:
        constant = template.text.split(WILDCARD)
        for row, *values in zip(template.rows, *template.parameters, strict=True):
            rest = (v + c for v, c in zip(values, constant[1:], strict=True))
            texts[row] = constant[0] + "".join(rest)
    return texts


def log_of_rows(
    templates: Sequence[str],
    parameters: Sequence[tuple[str, ...]],
    fields: Mapping[str, Sequence[str]],
) -> ParsedLog:
    """Turns a template and parameters for each message into columns."""
    rows: dict[str, list[int]] = {}
    for row, template in enumerate(templates):
        rows.setdefault(template, []).append(row)
    ids = np.zeros(len(templates), np.int32)
    found = []
    for at, (text, own) in enumerate(rows.items()):
        ids[own] = at
        columns = zip(*(parameters[row] for row in own), strict=True)
        found.append(Template(text, np.asarray(own), tuple(map(strings, columns))))
    named = {name: strings(column) for name, column in fields.items()}
    return ParsedLog(tuple(found), ids, named)


def strings(values: Sequence[Any]) -> np.ndarray:
    """An object array: texts keep their lengths, and the longest costs only itself."""
    column = np.empty(len(values), object)
    column[:] = values
    return column


@functools.lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern[str]:
    constant = map(re.escape, template.split(WILDCARD))
    return re.compile("(.*?)".join(constant), re.DOTALL)
