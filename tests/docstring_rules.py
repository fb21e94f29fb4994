"""What docstrings must contain, and how they begin; sentences about what is missing."""

import ast
import inspect
import pathlib
import re
import textwrap
from typing import Any

from tests import public_names

SECTIONS = (
    "Args",
    "Returns",
    "Raises",
    "Derivatives",
    "Cost",
    "Source",
    "Example",
)
_HEADING = re.compile(rf"^({'|'.join(SECTIONS)}):[ \t]*(.*)$", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*):", re.MULTILINE)
EXAMPLE_LINES = 6
# A docstring begins with a verb or the noun that is returned, not with a preposition,
# a question or a reference to another docstring. "Whether" may begin a predicate's.
PREPOSITIONS = ("As", "By", "For", "From", "If", "In", "Into", "Of", "With", "Without")
QUESTIONS = ("Are", "Do", "Does", "How", "Is", "What", "Where", "Which", "Whose", "Why")
RIDDLES = (*PREPOSITIONS, *QUESTIONS, "It", "Likewise", "Those")


def sections(docstring: str) -> dict[str, str]:
    """Heading -> text below it; the text before the first heading has the key ""."""
    parts = _HEADING.split(inspect.cleandoc(docstring))
    found = {"": parts[0]}
    for heading, first, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        found[heading] = f"{first}{rest}".strip("\n")
    return found


def entries(section: str) -> list[str]:
    """Names that a section of the form `name: meaning` explains, in its order."""
    return [
        name.strip().lstrip("*")
        for group in _ENTRY.findall(section)
        for name in group.split(",")
    ]


def complaints(value: Any, *, numeric: bool | None = None) -> list[str]:
    """Of a public function or class. `numeric` None: told by the annotations."""
    docstring = value.__doc__
    if not docstring:
        return ["has no docstring"]
    found = _summary_complaints(docstring)
    if inspect.isclass(value):
        return found + _class_complaints(value, sections(docstring))
    if numeric is None:
        numeric = returns_arrays(value)
    return found + _function_complaints(value, sections(docstring), numeric)


def returns_arrays(function: Any) -> bool:
    """Does a call compute arrays, so that derivatives and cost are worth a line?"""
    annotation = inspect.signature(inspect.unwrap(function)).return_annotation
    return "Array" in str(annotation) or (
        inspect.isclass(annotation) and public_names.is_named_tuple(annotation)
    )


def raises(function: Any) -> bool:
    """Does its own text hold a `raise` or call a check of `softlib._checks`?"""
    function = inspect.unwrap(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.startswith("_checks."):
                return True
            target = function.__globals__.get(called)
            if getattr(target, "__module__", None) == "softlib._checks":
                return True
    return False


def riddles(source: str) -> list[str]:
    """First lines, public and private, that begin as no docstring should."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    lines = [(ast.get_docstring(node) or "").partition("\n")[0] for node in nodes]
    return [line for line in lines if line.partition(" ")[0] in RIDDLES]


def files_without_riddles(repository: pathlib.Path) -> list[pathlib.Path]:
    """The files of softlib and of the kernels."""
    folders = (repository / "softlib", repository / "pallas_kernels")
    return [file for folder in folders for file in folder.rglob("*.py")]


def _summary_complaints(docstring: str) -> list[str]:
    first, *rest = inspect.cleandoc(docstring).split("\n")
    found = []
    if not re.search(r"[.)]$", first):
        found.append(f"first line is no sentence: {first!r}")
    if rest and rest[0]:
        found.append("second line is not empty")
    return found


def _example_complaints(found_sections: dict[str, str]) -> list[str]:
    example = found_sections.get("Example", "")
    if ">>>" not in example:
        return ["Example: missing, or without `>>>`"]
    lines = re.findall(r"^\s*(?:>>>|\.\.\.)", example, re.MULTILINE)
    if len(lines) > EXAMPLE_LINES:
        return [f"Example: {len(lines)} lines, more than {EXAMPLE_LINES}"]
    return []


def _args_complaints(
    parameters: list[str], found_sections: dict[str, str]
) -> list[str]:
    explained = entries(found_sections.get("Args", ""))
    missing = [name for name in parameters if name not in explained]
    unknown = [name for name in explained if name not in parameters]
    return [f"Args: {name} is not explained" for name in missing] + [
        f"Args: {name} is no parameter" for name in unknown
    ]


def _function_complaints(
    function: Any, found_sections: dict[str, str], numeric: bool
) -> list[str]:
    found = _args_complaints(public_names.parameters(function), found_sections)
    required = ["Derivatives", "Cost"] if numeric else []
    annotation = inspect.signature(inspect.unwrap(function)).return_annotation
    if annotation is not None:
        required.append("Returns")
    if raises(function):
        required.append("Raises")
    found += [f"{name}: missing" for name in required if not found_sections.get(name)]
    order = [name for name in found_sections if name in SECTIONS]
    if order != sorted(order, key=SECTIONS.index):
        found.append(f"sections in the order {', '.join(order)}")
    return found + _example_complaints(found_sections)


def _method_complaints(name: str, method: Any) -> list[str]:
    """Of arguments, where the docstring of the method explains some."""
    explained = sections(method.__doc__ or "")
    if "Args" not in explained:
        return []
    found = _args_complaints(public_names.parameters(method), explained)
    return [f"method {name}: {complaint}" for complaint in found]


def _class_complaints(cls: type, found_sections: dict[str, str]) -> list[str]:
    """Lighter: every field or parameter is explained, every method has a docstring."""
    if public_names.is_named_tuple(cls):
        text = cls.__doc__ or ""
        return [
            f"field {name} is not explained"
            for name in cls._fields
            if not re.search(rf"(`{name}`|^\s*{name}:)", text, re.MULTILINE)
        ]
    found = _args_complaints(public_names.parameters(cls), found_sections)
    for name, method in public_names.public_methods(cls).items():
        # What a base class says of a method holds for it, too.
        if not inspect.getdoc(getattr(cls, name, method)) and not method.__doc__:
            found.append(f"method {name} has no docstring")
        found += _method_complaints(name, getattr(method, "__func__", method))
    return found + _example_complaints(found_sections)
