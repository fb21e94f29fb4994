"""The ways to break one expression of a file."""

import ast
import copy
import dataclasses
import re
from collections.abc import Iterator


def _table(text: str) -> dict[str, str]:
    return dict(pair.split() for pair in text.split(","))


# Of the syntax tree, and of functions: what stands for what.
OPERATORS = {
    getattr(ast, old): getattr(ast, new)
    for old, new in _table(
        "Add Sub, Sub Add, Mult Div, Div Mult, FloorDiv Mult, Mod FloorDiv, Pow Mult, "
        "BitAnd BitOr, BitOr BitAnd, And Or, Or And, Lt LtE, LtE Lt, Gt GtE, GtE Gt, "
        "Eq NotEq, NotEq Eq, In NotIn, NotIn In"
    ).items()
}
NAMES = _table(
    "maximum minimum, minimum maximum, max min, min max, argmax argmin, argmin argmax, "
    "any all, all any, logaddexp maximum, log1p log, expm1 exp, exp2 exp"
)
# Arguments that only check, so that no result is another without them.
CHECKS = {"strict"}
# Functions of one array that are left out.
IDENTITY = {"exp", "log", "tanh", "abs", "sqrt", "square", "stop_gradient", "softplus"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """Source text to be replaced, by its place in characters."""

    path: str
    line: int
    start: int
    stop: int
    old: str
    new: str

    def apply(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.stop :]

    def __str__(self) -> str:
        """The place, and what differs."""
        old, new = (re.sub(r"\s+", " ", x) for x in (self.old, self.new[1:-1]))
        same = next(
            (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0
        )
        start = max(same - 24, 0)
        old, new = (x[start : start + 60] for x in (old, new))
        return f"{self.path}:{self.line} {old} -> {new}"


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All of a file, in the order of its expressions; each still is Python."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines()

    def place(line: int, column: int) -> int:
        # The columns of a syntax tree are bytes.
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found = []
    for node in _expressions(ast.parse(source)):
        start = place(node.lineno, node.col_offset)
        stop = place(node.end_lineno or 0, node.end_col_offset or 0)
        old = source[start:stop]
        for changed in _changes(node):
            new = f"({ast.unparse(changed)})"
            found.append(Mutant(path, node.lineno, start, stop, old, new))
    return found


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Those that compute: no types, no decorators, no texts, no errors."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            skipped = (ast.Raise, ast.Assert, ast.JoinedStr, ast.TypeAlias)
            if not isinstance(child, ast.AST) or isinstance(child, skipped):
                continue
            if isinstance(child, ast.keyword) and child.arg in CHECKS:
                continue
            if isinstance(child, ast.expr):
                yield child
            yield from _expressions(child)


def _changes(node: ast.expr) -> Iterator[ast.expr]:
    """Ways to break one expression."""
    match node:
        case ast.BinOp() | ast.BoolOp() if type(node.op) in OPERATORS:
            yield _replaced(node, op=OPERATORS[type(node.op)]())
        case ast.Compare() if type(node.ops[0]) in OPERATORS:
            operator = OPERATORS[type(node.ops[0])]()
            yield _replaced(node, ops=[operator, *node.ops[1:]])
        case ast.UnaryOp():
            yield node.operand
        case ast.IfExp():
            yield node.body
            yield node.orelse
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield ast.Constant(node.value + 1)
        case ast.Constant(value=float()):
            yield ast.Constant(2 * node.value or 1.0)
        case ast.Call():
            yield from _changes_of_call(node)


def _changes_of_call(node: ast.Call) -> Iterator[ast.expr]:
    names: dict[type, str] = {ast.Name: "id", ast.Attribute: "attr"}
    name = names.get(type(node.func))
    called = getattr(node.func, name) if name else None
    plain = not any(isinstance(argument, ast.Starred) for argument in node.args)
    if name and called in NAMES:
        yield _replaced(node, func=_replaced(node.func, **{name: NAMES[called]}))
    if called == "where" and plain and len(node.args) == 3:
        yield node.args[1]
        yield node.args[2]
    if called in IDENTITY and plain and len(node.args) == 1:
        yield node.args[0]
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in CHECKS:
            yield _replaced(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def _replaced[T: ast.AST](node: T, **fields: object) -> T:
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node
