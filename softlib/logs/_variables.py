"""Messages as tokens for a tagger, and templates in which some variables stay."""

import re
import zlib
from collections.abc import Collection, Sequence

import numpy as np

from ._record import WILDCARD

_TOKEN = re.compile(r"""\s+|[][(){}<>"',;:=|]|[^\s\][(){}<>"',;:=|]+""")
_SHAPES = (
    r"\s+",
    r"[][(){}<>\"',;:=|]",
    r"[+-]?[0-9]+",
    r"[+-]?[0-9]+\.[0-9]+",
    r"(?:0x)?[0-9a-fA-F]*[0-9][0-9a-fA-F]*",
    r"[a-z]+",
    r"[A-Z][a-z]+",
    r"[A-Z]+",
    r"[0-9.]+[A-Za-z%]+",
    r".*[0-9].*",
    r".*/.*",
    r".*\..*",
    r".*[-_].*",
    r".*[A-Za-z].*",
)
_PATTERNS = tuple(re.compile(shape, re.DOTALL) for shape in _SHAPES)


def message_tokens(message: str) -> list[str]:
    """The tokens of a message: words, white space and marks; joined they are it.

    Args:
        message: One line.

    Returns:
        Texts that are not empty.

    Example:
        >>> print(softlib.logs.message_tokens("took=35 ms, ok"))
        ['took', '=', '35', ' ', 'ms', ',', ' ', 'ok']
    """
    return _TOKEN.findall(message)


def token_features(tokens: Sequence[str], *, buckets: int = 64) -> np.ndarray:
    """Features of tokens that a small tagger learns from.

    Args:
        tokens: The tokens of a message.
        buckets: How many classes of words there are; at least 1. A word without a digit
            is in one of them by a hash of its lower-case text, the same in every run.

    Returns:
        An array (tokens, 15 + `buckets`), float32: which of 14 shapes a token has (a
        number, a path, capitals, ...), its length, and its class.

    Raises:
        ValueError: `buckets` is below 1.

    Example:
        >>> found = softlib.logs.token_features(["job", " ", "35"], buckets=4)
        >>> print(found.shape, found[2, :4])
        (3, 19) [0. 0. 1. 0.]
    """
    if buckets < 1:
        raise ValueError(
            f"token_features: `buckets` must be at least 1, got {buckets}."
        )
    found = np.zeros((len(tokens), len(_PATTERNS) + 1 + buckets), np.float32)
    for row, token in zip(found, tokens, strict=True):
        row[: len(_PATTERNS)] = [p.fullmatch(token) is not None for p in _PATTERNS]
        row[len(_PATTERNS)] = np.log1p(len(token))
        if not any(map(str.isdigit, token)):
            word = zlib.crc32(token.lower().encode("utf-8", "surrogateescape"))
            row[len(_PATTERNS) + 1 + word % buckets] = 1
    return found


def variable_aware_template(
    tokens: Sequence[str], tags: Sequence[str], *, keep: Collection[str] = ()
) -> str:
    """The template of a message whose variables have kinds; some kinds stay.

    Args:
        tokens: The tokens of the message.
        tags: The kind of variable of each token, such as "id" or "duration"; "" for
            static text. Neighbours of one kind are one variable.
        keep: Kinds whose text stays in the template, so that the messages of each
            value are a group of their own.

    Returns:
        The message with `<*>` for every variable of another kind.

    Raises:
        ValueError: There is not one tag for each token.

    Source: "Did We Miss Something Important? Studying and Exploring Variable-Aware Log
        Abstraction".

    Example:
        >>> tokens = ["exit", " ", "1", " ", "in", " ", "3", " ", "s"]
        >>> tags = ["", "", "status", "", "", "", *["duration"] * 3]
        >>> template = softlib.logs.variable_aware_template
        >>> print(template(tokens, tags, keep=["status"]))
        exit 1 in <*>
    """
    if len(tags) != len(tokens):
        raise ValueError(
            "variable_aware_template: `tags` must have one entry for each of the "
            f"{len(tokens)} tokens, got {len(tags)}."
        )
    parts, before = [], ""
    for token, tag in zip(tokens, tags, strict=True):
        if not tag or tag in keep:
            parts.append(token)
        elif tag != before:
            parts.append(WILDCARD)
        before = tag
    return "".join(parts)
