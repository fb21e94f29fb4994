"""LogQL, the part of it that reads lines, filters them, and counts them.

query  = logs | metric
logs   = "{" match ("," match)* "}" stage*
match  = label ("=" | "!=" | "=~" | "!~") text
stage  = ("|=" | "!=" | "|~" | "!~") text | "|" ("json" | "logfmt")
| "|" label ("=" | "!=") text
| "|" label ("==" | "!=" | ">" | ">=" | "<" | "<=") number
metric = ("rate" | "count_over_time") "(" logs "[" number unit "]" ")"
| "sum" ["by" "(" label ("," label)* ")"] "(" metric ")"
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from softlib import _checks as checks

_TOKEN = re.compile(
    r'\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)'
    r"|(?P<name>[A-Za-z_]\w*)|(?P<sign>\|=|\|~|!=|!~|=~|==|>=|<=|[{}()\[\],=<>|]))"
)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_LOGFMT = re.compile(r'([A-Za-z_][\w.]*)=("(?:[^"\\]|\\.)*"|[^\s"]*)')
_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
}


class LogqlStage(NamedTuple):
    """A step of a query: a match of a label, or a stage of the pipeline.

    Attributes:
        kind: "match" or "line", or "parse", or "label" for a later filter of a label.
        name: Of the label or of the parser; "" for a filter of lines.
        operator: As it is written; "" for a parser.
        value: What is compared with: a text, a number, or None for a parser.
    """

    kind: str
    name: str
    operator: str
    value: str | float | None


class LogqlQuery(NamedTuple):
    """A query that was read. Two that mean the same by their parts are equal.

    Attributes:
        matches: Of labels, sorted: their order has no meaning.
        stages: Filters and parsers in their order.
        function: "rate" or "count_over_time"; None for a query of lines.
        seconds: The range of a metric; 0 for a query of lines.
        by: The labels of a sum, sorted; None without a sum.
    """

    matches: tuple[LogqlStage, ...]
    stages: tuple[LogqlStage, ...]
    function: str | None
    seconds: float
    by: tuple[str, ...] | None

    def __str__(self) -> str:
        """The query in one form: spaces and the order of matches are always alike."""
        text = "{" + ", ".join(map(_written, self.matches)) + "}"
        text += "".join(" " + _written(stage) for stage in self.stages)
        if self.function is None:
            return text
        text = f"{self.function}({text} [{_written_range(self.seconds)}])"
        if self.by is None:
            return text
        by = f" by ({', '.join(self.by)})" if self.by else ""
        return f"sum{by} ({text})"


def parse_logql(query: str) -> LogqlQuery:
    """A query of LogQL as a value.

    The part that is known: selectors of labels, filters of lines and of labels, `json`
    and `logfmt`, `rate` and `count_over_time` over a range, and `sum` of them by
    labels.

    Args:
        query: The text.

    Returns:
        The parts. `str` of it is the query in one form, so that two spellings compare
        equal.

    Raises:
        ValueError: The text is no query of this part; the message says what was
            expected, and where.

    Source: the language of "Chatting with Logs: An exploratory study on Finetuning LLMs
        for LogQL".

    Example:
        >>> query = softlib.logs.parse_logql('{unit="ssh",level="error"}|="port"')
        >>> print(query)
        {level="error", unit="ssh"} |= "port"
    """
    return _Parser(query).query()


def execute_logql(
    query: str | LogqlQuery,
    lines: Sequence[str],
    labels: Mapping[str, Sequence[str]],
    times: Sequence[float] | np.ndarray,
    *,
    at: float | None = None,
) -> np.ndarray | dict[tuple[tuple[str, str], ...], float]:
    """Lines or counts that a query finds in a log.

    Args:
        query: Its text, or what `parse_logql` made of it.
        lines: The N lines: of a `ParsedLog` its `message_texts`.
        labels: Columns of N texts by name: the `fields` of a `ParsedLog`.
        times: When each line was written, in seconds.
        at: The instant of a metric, in seconds; None: the time of the last line. The
            range ends there, and its first instant does not count.

    Returns:
        The numbers of the lines, ascending, int64, for a query of lines. For a metric
        its value for each set of labels that has one, (name, value) in order of names:
        lines per second for `rate`.

    Raises:
        ValueError: The text is no query, or columns have different lengths.

    Cost: one pass over the lines for each filter, of those that are left.
    Source: as `parse_logql`. A line that a parser cannot read stays, without labels of
        it; LogQL adds a label `__error__` instead.

    Example:
        >>> lines, labels = ["ok", "no route", "ok"], {"unit": ["net", "net", "disk"]}
        >>> find = softlib.logs.execute_logql
        >>> print(find('{unit="net"} |= "route"', lines, labels, [0.0, 1.0, 2.0]))
        [1]
    """
    function = "execute_logql"
    with checks.under_name(function, "parse_logql"):
        parsed = parse_logql(query) if isinstance(query, str) else query
    when = np.asarray(times, np.float64)
    sizes = {"times": len(when)} | {name: len(of) for name, of in labels.items()}
    for name, size in sizes.items():
        if size != len(lines):
            raise ValueError(
                f"{function}: `{name}` must have one entry for each of the "
                f"{len(lines)} lines, got {size}."
            )
    rows: Iterator[int] = iter(range(len(lines)))
    if parsed.function is not None:
        end = at if at is not None else float(when.max(initial=-math.inf))
        inside = (when > end - parsed.seconds) & (when <= end)
        rows = iter(np.flatnonzero(inside).tolist())
    found = list(_left(parsed, rows, lines, labels))
    if parsed.function is None:
        return np.array([row for row, _ in found], np.int64)
    one = 1 / parsed.seconds if parsed.function == "rate" else 1.0
    series: dict[tuple[tuple[str, str], ...], float] = {}
    for _, own in found:
        names = sorted(own) if parsed.by is None else parsed.by
        key = tuple((name, own[name]) for name in names if own.get(name))
        series[key] = series.get(key, 0.0) + one
    return series


def logql_execution_match(
    query: str,
    reference: str,
    lines: Sequence[str],
    labels: Mapping[str, Sequence[str]],
    times: Sequence[float] | np.ndarray,
    *,
    at: float | None = None,
    tolerance: float = 1e-9,
) -> bool:
    """Whether two queries find the same in a log.

    Args:
        query: A text that need not be a query: then False.
        reference: The query that is right.
        lines, labels, times, at: As in `execute_logql`.
        tolerance: The largest relative difference of the values of metrics.

    Returns:
        True if both find the same lines, or the same values for the same labels.

    Raises:
        ValueError: The reference is no query, or columns have different lengths.

    Cost: that of both queries.
    Source: the execution match of "Chatting with Logs: An exploratory study on
        Finetuning LLMs for LogQL".

    Example:
        >>> log = ["ok", "no"], {"unit": ["net", "net"]}, [0.0, 1.0]
        >>> match = softlib.logs.logql_execution_match
        >>> print(match('{unit="net"} != "ok"', '{unit=~"n.*"} |= "no"', *log))
        True
    """
    function = "logql_execution_match"
    with checks.under_name(function, "execute_logql"):
        wanted = execute_logql(reference, lines, labels, times, at=at)
    try:
        parsed = parse_logql(query)
    except ValueError:
        return False
    found = execute_logql(parsed, lines, labels, times, at=at)
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(math.isclose(found[k], wanted[k], rel_tol=tolerance) for k in found)
        )
    return not isinstance(found, dict) and np.array_equal(found, wanted)


# -------------------------------------------------------------------------- its meaning
def _left(
    query: LogqlQuery,
    rows: Iterator[int],
    lines: Sequence[str],
    columns: Mapping[str, Sequence[str]],
) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines that every filter leaves, with their labels."""
    stages = [(stage, _test(stage)) for stage in (*query.matches, *query.stages)]
    for row in rows:
        line = lines[row]
        own = {name: column[row] for name, column in columns.items()}
        for stage, test in stages:
            if stage.kind == "parse":
                read = _json_labels if stage.name == "json" else _logfmt_labels
                # A label of the stream is not overwritten.
                own = read(line) | own
            elif not test(line if stage.kind == "line" else own.get(stage.name, "")):
                break
        else:
            yield row, own


def _test(stage: LogqlStage) -> Callable[[str], bool]:
    value, operator = stage.value, stage.operator
    if isinstance(value, float):
        compare, bound = _ORDER[operator], value
        return lambda text: (x := _number(text)) is not None and compare(x, bound)
    if value is None:
        return lambda text: True
    if operator in ("=~", "!~", "|~"):
        pattern = re.compile(value)
        # Anywhere in a line, but all of a label.
        search = pattern.search if stage.kind == "line" else pattern.fullmatch
        return lambda text: (search(text) is None) == (operator == "!~")
    if stage.kind == "line":
        return lambda text: (value in text) == (operator == "|=")
    return lambda text: (value == text) == (operator in ("=", "=="))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _json_labels(line: str) -> dict[str, str]:
    try:
        fields = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(fields, dict):
        return {}
    plain = {k: v for k, v in fields.items() if isinstance(v, str | int | float)}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in plain.items()}


def _logfmt_labels(line: str) -> dict[str, str]:
    return {name: _unquoted(value) for name, value in _LOGFMT.findall(line)}


# ------------------------------------------------------------------------- its spelling
def _unquoted(text: str) -> str:
    if text[:1] == '"':
        escape = {"n": "\n", "t": "\t"}
        return re.sub(r"\\(.)", lambda m: escape.get(m[1], m[1]), text[1:-1])
    return text[1:-1] if text[:1] == "`" else text


def _quoted(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(plain, escaped)
    return f'"{text}"'


def _written(stage: LogqlStage) -> str:
    value = stage.value
    if stage.kind == "parse":
        return f"| {stage.name}"
    text = f"{value:.15g}" if isinstance(value, float) else _quoted(str(value))
    if stage.kind == "match":
        return f"{stage.name}{stage.operator}{text}"
    if stage.kind == "line":
        return f"{stage.operator} {text}"
    return f"| {stage.name} {stage.operator} {text}"


def _written_range(seconds: float) -> str:
    for unit in ("d", "h", "m", "s"):
        count = seconds / _SECONDS[unit]
        if count == int(count):
            return f"{int(count)}{unit}"
    return f"{seconds * 1000:.15g}ms"


class _Parser:
    """Reads a query from the left, one token ahead."""

    def __init__(self, query: str) -> None:
        self._query = query
        self._place = 0
        self._next()

    def query(self) -> LogqlQuery:
        found = self._metric() if self._kind == "name" else self._logs()
        if self._kind != "end":
            raise self._error("the end")
        return found

    def _metric(self) -> LogqlQuery:
        function = self._take("name", "rate", "count_over_time", "sum")
        if function != "sum":
            self._take("sign", "(")
            logs = self._logs()
            self._take("sign", "[")
            count = float(self._take("number"))
            unit = self._take("name", *_SECONDS)
            seconds = count * _SECONDS[unit]
            if seconds <= 0:
                raise self._error("a range above 0 before it")
            self._take("sign", "]")
            self._take("sign", ")")
            return logs._replace(function=function, seconds=seconds)
        by: list[str] = []
        if self._text == "by":
            self._next()
            self._take("sign", "(")
            by = [self._take("name")]
            while self._text == ",":
                self._next()
                by.append(self._take("name"))
            self._take("sign", ")")
        self._take("sign", "(")
        inner = self._metric()
        if inner.by is not None:
            raise self._error("one sum only before it")
        self._take("sign", ")")
        return inner._replace(by=tuple(sorted(set(by))))

    def _logs(self) -> LogqlQuery:
        self._take("sign", "{")
        matches = [self._match()]
        while self._text == ",":
            self._next()
            matches.append(self._match())
        self._take("sign", "}")
        stages = []
        while self._kind == "sign" and self._text in ("|=", "!=", "|~", "!~", "|"):
            stages.append(self._stage())
        return LogqlQuery(tuple(sorted(set(matches))), tuple(stages), None, 0.0, None)

    def _match(self) -> LogqlStage:
        name = self._take("name")
        operator = self._take("sign", "=", "!=", "=~", "!~")
        return LogqlStage("match", name, operator, self._value(operator))

    def _stage(self) -> LogqlStage:
        operator = self._take("sign")
        if operator != "|":
            return LogqlStage("line", "", operator, self._value(operator))
        name = self._take("name")
        if name in ("json", "logfmt") and self._text not in (*_ORDER, "="):
            return LogqlStage("parse", name, "", None)
        operator = self._take("sign", *_ORDER, "=", "=~", "!~")
        if self._kind == "number" and operator in _ORDER:
            return LogqlStage("label", name, operator, float(self._take("number")))
        if operator in _ORDER and operator != "!=":
            raise self._error("a number")
        return LogqlStage("label", name, operator, self._value(operator))

    def _value(self, operator: str) -> str:
        text = _unquoted(self._take("text"))
        if "~" in operator:
            try:
                re.compile(text)
            except re.error:
                raise self._error("a regular expression before it") from None
        return text

    def _take(self, kind: str, *choices: str) -> str:
        text = self._text
        if self._kind != kind or (choices and text not in choices):
            raise self._error(" or ".join(map(repr, choices)) or f"a {kind}")
        self._next()
        return text

    def _next(self) -> None:
        self._start = self._place
        if not self._query[self._place :].strip():
            self._kind, self._text = "end", ""
            return
        found = _TOKEN.match(self._query, self._place)
        if found is None or found.lastgroup is None:
            self._kind, self._text = "unknown", self._query[self._place :].strip()[:10]
            return
        self._place = found.end()
        self._kind, self._text = found.lastgroup, found[found.lastgroup]

    def _error(self, wanted: str) -> ValueError:
        got = repr(self._text) if self._text else "the end"
        return ValueError(
            f"parse_logql: `query` must have {wanted} at character {self._start}, got "
            f"{got}."
        )
