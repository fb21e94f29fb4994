"""Who may import whom, read from the syntax tree of every file.

The table is the architecture: a new edge is a change of architecture and is made here.
"""

import ast
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

EVERYWHERE = {"jax", "jaxtyping", "numpy"}
LIBRARY = {"softlib", "pallas_kernels"}

ROWS = {"softmax", "masks", "information"}
ENGINES = {"attention", "logits", "recurrent"}
STUDIES = {"decoding", "scoring", "estimation"}
APPLICATIONS = {"bandits", "logs"}
MODELLESS = (
    {"numerics", "quantize", "losses", "metrics", "mining"} | ROWS | ENGINES | STUDIES
)

# Package -> what its files may import besides EVERYWHERE, the standard library, the
# private files at the root of softlib, and its own files.
MAY_IMPORT: Mapping[str, set[str]] = {
    "numerics": set(),
    "quantize": set(),
    "softmax": {"numerics", "pallas_kernels"},
    "masks": {"numerics"},
    "information": {"numerics"},
    "attention": {"numerics", "pallas_kernels"} | ROWS,
    "logits": {"numerics", "quantize", "pallas_kernels"},
    "recurrent": set(),
    "metrics": set(),
    "mining": set(),
    "losses": {"numerics", "logits"} | ROWS,
    **{name: {"numerics", "losses"} | ROWS | ENGINES for name in STUDIES},
    "optim": {"optax", "numerics", "quantize", "losses"},
    "nn": {"flax"} | MODELLESS,
    **dict.fromkeys(APPLICATIONS, MODELLESS),
    "testing": {"masks"},
}
# Folders of an engine: their files import each other and what stands below the package,
# never the files beside the folder, which are its users.
ENGINE_FOLDERS = {"_engine", "_tuples", "_decode", "_polynomial"}
# A private file is private to its package. These reach into another so far.
REACHES_INTO = {
    ("decoding", "logits"),
    ("losses", "logits"),
}
# Imported only inside functions: users of the rest need not have them.
INSIDE_FUNCTIONS = {
    "logs": {"pyarrow", "tqdm", "zstandard"},
    "masks": {"matplotlib"},
    "testing": {"hypothesis", "pytest"},
}
# What kernels are written in. It takes as long to import as a third of jax.
KERNEL_LANGUAGE = "jax.experimental.pallas"


def module_name(path: pathlib.PurePath) -> str:
    """`softlib/losses/__init__.py` is `softlib.losses`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, path: pathlib.PurePath) -> Iterator[tuple]:
    """(node, absolute name, imported name or None) of every import in the tree."""
    package = path.parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield node, base, alias.name


def _inside_functions(tree: ast.AST) -> set[ast.AST]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    outer = (node for node in ast.walk(tree) if isinstance(node, functions))
    return {inner for function in outer for inner in ast.walk(function)}


def violations_anywhere(source: str, path: pathlib.PurePath) -> list[str]:
    """The rules that hold for tests, examples and benchmarks too."""
    tree = ast.parse(source)
    found = []
    for node, module, name in imported_modules(tree, path):
        if name == "*":
            found.append(f"{path}:{node.lineno}: star import from {module}")
        if f"{module}.{name}.".startswith("jax._src."):
            found.append(f"{path}:{node.lineno}: jax._src is private")
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "_src"
            and isinstance(node.value, ast.Name)
            and node.value.id == "jax"
        ):
            found.append(f"{path}:{node.lineno}: jax._src is private")
    return found


def violations(source: str, path: pathlib.PurePath, roots: set[str]) -> list[str]:
    """Sentences about the file of softlib or pallas_kernels at `path`.

    `roots` are the names of the files at the root of softlib without suffix, which
    every package may import.
    """
    found = violations_anywhere(source, path)
    tree = ast.parse(source)
    library, *inner = path.with_suffix("").parts
    package = inner[0] if len(inner) > 1 else None
    is_root_init = library == "softlib" and inner == ["__init__"]
    in_function = _inside_functions(tree)

    for node, module, name in imported_modules(tree, path):
        top, *rest = module.split(".")
        say = lambda text, node=node: found.append(f"{path}:{node.lineno}: {text}")
        nested = node in in_function
        if (
            nested
            and module not in INSIDE_FUNCTIONS.get(package or "", set())
            # `kernels_out_of_place` says which.
            and not (library == "softlib" and top == "pallas_kernels")
        ):
            say(f"import of {module} inside a function")
            continue
        if module == "importlib" and not is_root_init:
            say("importlib hides an import from this test")
        if library == "pallas_kernels":
            if top not in {"jax", "numpy", "pallas_kernels"} | sys.stdlib_module_names:
                say(f"pallas_kernels imports jax and NumPy only, not {module}")
            continue
        if top == "softlib":
            target = rest[0] if rest else name
            if target is None or (not rest and target not in roots | set(MAY_IMPORT)):
                if not is_root_init:
                    say("a file of softlib imports files, not softlib itself")
                continue
            if target in roots:
                continue
            if is_root_init:
                if target not in MAY_IMPORT:
                    say(f"{target} is no package of the table")
            elif target == package:
                file = rest[1:] or ([name] if _is_file(name) else [])
                if not file:
                    say(f"a file of {package} imports its files, not {module}")
                elif inner[1] in ENGINE_FOLDERS and file[0] not in ENGINE_FOLDERS:
                    say(f"a file of {inner[1]} is below {file[0]}")
            elif package is None or target not in MAY_IMPORT.get(package, set()):
                say(f"{package or 'a root file'} may not import {target}")
            elif (package, target) not in REACHES_INTO and any(
                map(_is_file, (*rest[1:], name))
            ):
                say(f"{module} is private to {target}")
            continue
        allowed = EVERYWHERE | sys.stdlib_module_names
        if package in MAY_IMPORT:
            allowed = allowed | MAY_IMPORT[package]
            if nested:
                allowed = allowed | INSIDE_FUNCTIONS.get(package, set())
        elif package is not None:
            say(f"{package} is no package of the table")
        if top not in allowed:
            say(f"{package or 'a root file'} may not import {module}")
    if path.name == "__init__.py" and not is_root_init:
        found += _init_violations(tree, path)
    return found


def _is_file(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.startswith("__")


def _init_violations(tree: ast.Module, path: pathlib.PurePath) -> list[str]:
    """A package's `__init__` holds a docstring, re-exports and `__all__` only."""
    if ast.get_docstring(tree) is None:
        return [f"{path}:1: a package says in a docstring what is inside"]
    found, exported, listed = [], [], None
    for statement in tree.body[1:]:
        match statement:
            case ast.ImportFrom(names=names):
                for alias in names:
                    exported.append(alias.asname)
                    if alias.asname != alias.name:
                        found.append(
                            f"{path}:{statement.lineno}: write "
                            f"`import {alias.name} as {alias.name}`"
                        )
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                listed = ast.literal_eval(value)
            case _:
                found.append(f"{path}:{statement.lineno}: code in an __init__")
    if exported and sorted(listed or ()) != sorted(filter(None, exported)):
        found.append(f"{path}:1: __all__ is not the list of what is re-exported")
    return found


class Edge(NamedTuple):
    """An import.

    Attributes:
        line: Of the file.
        target: The file, or what is imported from elsewhere.
        nested: Whether it is inside a function.
    """

    line: int
    target: str
    nested: bool


def edges_of(files: Mapping[str, str]) -> dict[str, list[Edge]]:
    """The imports of each module of the given files (path -> source)."""
    paths = {module_name(pathlib.PurePath(path)): path for path in files}
    edges: dict[str, list[Edge]] = {}
    for module, path in paths.items():
        tree, here = ast.parse(files[path]), pathlib.PurePath(path)
        nested = _inside_functions(tree)
        edges[module] = []
        for node, base, name in imported_modules(tree, here):
            # `from softlib import _checks` names a file, `from ._checks import f` too.
            target = full if (full := f"{base}.{name}") in paths else base
            if full == KERNEL_LANGUAGE:
                target = full
            edges[module].append(Edge(node.lineno, target, node in nested))
    return edges


def kernels_out_of_place(files: Mapping[str, str]) -> list[str]:
    """Imports of pallas_kernels in softlib that are not where they should be.

    What loads the language of kernels, by itself or through others, is imported by the
    functions that call a kernel; what does not, and planning needs, at the top.
    """
    edges = edges_of(files)
    slow: set[str] = set()
    while True:
        found = {
            module
            for module, imports in edges.items()
            for _, target, nested in imports
            if not nested and (target in slow or target.startswith(KERNEL_LANGUAGE))
        }
        if found == slow:
            break
        slow = found
    sentences = []
    for module, imports in edges.items():
        if not module.startswith("softlib"):
            continue
        for line, target, nested in imports:
            if not target.startswith("pallas_kernels"):
                continue
            if target in slow and not nested:
                sentences.append(f"{module}:{line}: {target} loads {KERNEL_LANGUAGE}")
            if target not in slow and nested:
                sentences.append(f"{module}:{line}: {target} belongs to the top")
    return sentences


def cycles(files: Mapping[str, str]) -> list[str]:
    """Circles of imports between the given files (path -> source), each named once."""
    found = edges_of(files)
    edges = {
        module: {edge.target for edge in imports} & found.keys() - {module}
        for module, imports in found.items()
    }
    circles, finished = [], set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            circles.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in finished:
            for target in sorted(edges[module]):
                visit(target, [*trail, module])
            finished.add(module)

    for module in sorted(edges):
        visit(module, [])
    return circles
