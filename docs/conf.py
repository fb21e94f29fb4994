"""Sphinx configuration: MyST pages, executed where they hold cells, and autodoc."""

import ast
import dataclasses
import inspect
import logging
import os
import pathlib
import sys
import textwrap

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import softlib
from docs import docstring_markup, page_outputs, page_turns
from tests import selection

project = "softlib"
author = "the softlib developers"
copyright = author
version = release = softlib.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"softlib {release}"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
# `make docs PAGES=2` executes one page in two, which ones by the number of commits.
nb_execution_excludepatterns = page_turns.left_out(
    int(os.environ.get("PAGES") or 1), selection.commits(page_turns.DOCS)
)
# The language of a page's cells is known from its execution alone.
suppress_warnings = ["myst-nb.lexer"] if nb_execution_excludepatterns else []
# What a cell prints is one output, however long it takes from line to line.
nb_merge_streams = True

autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
add_module_names = False
python_maximum_signature_line_length = 80


def _markdown_to_rest(app, what, name, obj, options, lines: list[str]) -> None:
    docstring = "\n".join(lines).strip()
    if what == "data" and docstring == inspect.getdoc(type(obj)):
        lines.clear()  # of its type, say tuple; the page describes the value
    else:
        lines[:] = docstring_markup.to_rest(docstring).split("\n")


def _signature_in_source(
    app, what, name, obj, options, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Of a class whose own a metaclass hides or `dataclass` makes, as flax's do."""
    if what != "class" or issubclass(obj, tuple):
        return signature, returned
    if obj.__init__ is object.__init__:  # a base, which nobody calls
        return "", None
    written = obj if dataclasses.is_dataclass(obj) else obj.__init__
    node = ast.parse(textwrap.dedent(inspect.getsource(written))).body[0]
    if isinstance(node, ast.FunctionDef):
        del node.args.args[0]
        return f"({ast.unparse(node.args)})", None
    assert isinstance(node, ast.ClassDef)
    fields = [ast.unparse(s) for s in node.body if isinstance(s, ast.AnnAssign)]
    return f"({', '.join(fields)})", None


_seen: list[str] = []


def _look_at_outputs(app, page) -> None:
    for node in page_outputs.printed(page):
        _seen.append(node.astext())
        found = page_outputs.complaint(_seen[-1])
        if found is not None:
            _warn(f"a cell {found}", node)


def _look_whether_outputs_were_seen(app, environment) -> None:
    if not _seen:
        _warn("no page shows an output: they are looked for in the wrong place", None)


def _warn(text: str, location) -> None:
    # The logger of Sphinx, for which a warning of `make docs` is an error.
    logging.getLogger("sphinx.softlib").warning(text, extra={"location": location})


def setup(app) -> None:
    app.connect("doctree-read", _look_at_outputs)
    app.connect("env-updated", _look_whether_outputs_were_seen)
    app.connect("autodoc-process-docstring", _markdown_to_rest)
    app.connect("autodoc-process-signature", _signature_in_source)
