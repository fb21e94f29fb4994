"""Queries of LogQL as tokens, with the automaton of those that are queries."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ._logql import _quoted


class LogqlGrammar(NamedTuple):
    """Tokens whose texts, joined, make queries, and which may follow which.

    Attributes:
        tokens: The text of each; the last is "", the end of the query.
        transitions: Integers (states, tokens) for `softlib.decoding.TokenAutomaton`:
            the state after a token, -1 where it is not allowed. State 0 is the first.
        end: The id of the token that ends a query; nothing but it follows.
    """

    tokens: tuple[str, ...]
    transitions: np.ndarray
    end: int

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """The query of token ids, up to the end."""
        found = []
        for token in ids:
            if token == self.end:
                break
            found.append(self.tokens[int(token)])
        return "".join(found)


def logql_grammar(
    labels: Mapping[str, Sequence[str]],
    texts: Sequence[str],
    *,
    fields: Sequence[str] = (),
    numbers: Sequence[float] = (),
    ranges: Sequence[str] = ("5m", "1h"),
) -> LogqlGrammar:
    """Tokens of queries about one log, and the automaton that accepts the queries.

    With it as a processor of `softlib.decoding.generate` a model can write nothing but
    queries that `parse_logql` reads, whatever it has learned.

    Args:
        labels: The values of each label, of which a query takes one.
        texts: What lines are searched for, such as the words of templates.
        fields: Numbers in lines that `logfmt` or `json` finds, to compare.
        numbers: What they are compared with.
        ranges: Of metrics.

    Returns:
        A `LogqlGrammar` of fewer than 40 states.

    Raises:
        ValueError: There is no label with a value, or there are fields without numbers.

    Cost: states x tokens integers.
    Source: constrained decoding for "Chatting with Logs: An exploratory study on
        Finetuning LLMs for LogQL".

    Example:
        >>> grammar = softlib.logs.logql_grammar({"unit": ["net"]}, ["error"])
        >>> ids = [grammar.tokens.index(t) for t in ("{", 'unit="net"', "}")]
        >>> print(grammar.text(ids), grammar.transitions.shape[0])
        {unit="net"} 28
    """
    if not any(len(values) for values in labels.values()):
        raise ValueError(
            "logql_grammar: `labels` must hold a label with a value at least, got none."
        )
    if fields and not len(numbers):
        raise ValueError(
            "logql_grammar: `numbers` must hold one at least where there are `fields`, "
            "got none."
        )
    build = _Automaton()
    start, finished = build.state(), build.state()
    build.move(finished, [""], finished)

    def logs(begin: int) -> tuple[int, int]:
        """States for a selector and its pipeline; those in which it may end."""
        match, matched, lines, read = (build.state() for _ in range(4))
        build.move(begin, ["{"], match)
        for name, values in labels.items():
            pairs = [f"{name}{op}{_quoted(v)}" for v in values for op in ("=", "!=")]
            build.move(match, pairs, matched)
        build.move(matched, [", "], match)
        build.move(matched, ["}"], lines)
        for state in (lines, read):
            if texts:
                searched = build.state()
                build.move(state, [" |= ", " != "], searched)
                build.move(searched, [_quoted(text) for text in texts], state)
        if fields:
            build.move(lines, [" | json", " | logfmt"], read)
            compared, bound = build.state(), build.state()
            build.move(read, [f" | {name}" for name in fields], compared)
            signs = [f" {sign} " for sign in ("==", ">", ">=", "<", "<=")]
            build.move(compared, signs, bound)
            build.move(bound, [f"{number:.15g}" for number in numbers], read)
        return lines, read

    def metric(begin: int, closed: int) -> None:
        opened = build.state()
        build.move(begin, ["rate(", "count_over_time("], opened)
        for state in logs(opened):
            build.move(state, [f" [{span}])" for span in ranges], closed)

    for state in logs(start):
        build.move(state, [""], finished)
    alone, by, name, within, summed, closed = (build.state() for _ in range(6))
    metric(start, alone)
    build.move(alone, [""], finished)
    build.move(start, ["sum by ("], by)
    build.move(by, list(labels), name)
    build.move(name, [") ("], within)
    metric(within, summed)
    build.move(summed, [")"], closed)
    build.move(closed, [""], finished)
    return build.grammar()


class _Automaton:
    """States and moves, of which tokens become numbers at the end."""

    def __init__(self) -> None:
        self._moves: list[dict[str, int]] = []

    def state(self) -> int:
        self._moves.append({})
        return len(self._moves) - 1

    def move(self, state: int, tokens: Sequence[str], to: int) -> None:
        self._moves[state] |= dict.fromkeys(tokens, to)

    def grammar(self) -> LogqlGrammar:
        texts = dict.fromkeys(token for moves in self._moves for token in moves)
        texts.pop("")
        tokens = (*texts, "")
        of = {token: place for place, token in enumerate(tokens)}
        table = np.full((len(self._moves), len(tokens)), -1, np.int32)
        for state, moves in enumerate(self._moves):
            for token, to in moves.items():
                table[state, of[token]] = to
        return LogqlGrammar(tokens, table, len(tokens) - 1)
