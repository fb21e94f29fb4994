"""Functions of logits by the arrays that make them: how oracles and lists see them.

`of_head.f(hidden, weight, labels, bias=bias, gamma=2.0)` is `f` of
`softlib.LinearLogits(hidden, weight, bias=bias)`, and
`of_stored.f(array, labels, bias=bias, gamma=2.0)` that of `StoredLogits(array,
bias=bias)`, or of the array itself where nothing modifies it. Functions of two logits
take the arrays of both, and options of the second begin with `teacher_`; others are of
both.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import softlib

OF_STORED = (
    "bias",
    "scale",
    "softcap",
    "temperature",
    "class_where",
    "implementation",
)
OF_HEAD = (
    *OF_STORED,
    "vocab_axis",
    "vocab_chunk",
    "token_chunk",
    "gradient_filter_eps",
    "axis_name",
    "precision",
)
# Of functions of two logits, those that belong to either alone.
OWN = ("bias", "scale", "softcap", "vocab_axis")


def function_of(name: str) -> Callable[..., Any]:
    """The function of softlib.losses, softlib.logits or softlib.scoring."""
    for package in (softlib.losses, softlib.logits, softlib.scoring):
        if name in package.__all__:
            return getattr(package, name)
    raise AttributeError(f"no package with functions of logits has {name}")


def logits_of(function: Callable[..., Any]) -> list[str]:
    """The parameters that are logits."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.annotation is softlib.logits.Logits]


def number_before_logits(function: Callable[..., Any]) -> int:
    """How many parameters stand before the logits, such as a key."""
    first, *_ = logits_of(function)
    return list(inspect.signature(function).parameters).index(first)


def _split(
    function: Callable[..., Any], options: dict[str, Any], known: tuple[str, ...]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The options of each of the logits, and those of the function."""
    names = logits_of(function)
    own = inspect.signature(function).parameters
    of_each: list[dict[str, Any]] = [{} for _ in names]
    rest: dict[str, Any] = {}
    for option, value in options.items():
        plain = option.removeprefix("teacher_")
        if option in own or plain not in known:
            rest[option] = value
        elif option.startswith("teacher_"):
            of_each[1][plain] = value
        else:
            of_each[0][option] = value
            for other in of_each[1:]:
                if option not in OWN:
                    other[option] = value
    return of_each, rest


class _OfHead:
    """Functions with the arrays of heads in the place of logits."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = function_of(name)
        prefixes = [each.removesuffix("logits") for each in logits_of(function)]
        before = number_before_logits(function)

        @functools.wraps(function)
        def call(*arrays: Any, **options: Any) -> Any:
            first, rest, heads = arrays[:before], list(arrays[before:]), []
            for prefix in prefixes:
                operands = [
                    options.pop(prefix + operand) if not rest else rest.pop(0)
                    for operand in ("hidden", "weight")
                ]
                heads.append(operands)
            of_each, options = _split(function, options, OF_HEAD)
            pairs = zip(heads, of_each, strict=True)
            logits = [softlib.LinearLogits(*head, **own) for head, own in pairs]
            return function(*first, *logits, *rest, **options)

        return call


class _OfStored:
    """Functions with arrays of logits, and with what modifies them."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = function_of(name)
        names = logits_of(function)
        before = number_before_logits(function)

        @functools.wraps(function)
        def call(*arrays: Any, **options: Any) -> Any:
            first, rest = arrays[:before], list(arrays[before:])
            given = [options.pop(n) if not rest else rest.pop(0) for n in names]
            of_each, options = _split(function, options, OF_STORED)
            logits = [
                softlib.logits.StoredLogits(array, **own) if own else array
                for array, own in zip(given, of_each, strict=True)
            ]
            return function(*first, *logits, *rest, **options)

        return call


of_head: Any = _OfHead()
of_stored: Any = _OfStored()


def of(source: str) -> Any:
    """The functions of heads for "linear", of arrays for "logits"."""
    return {"linear": of_head, "logits": of_stored}[source]


def vq_cross_entropy(
    hidden: Any,
    codebook: Any,
    mapping: Any,
    labels: Any,
    *,
    where: Any = None,
    **options: Any,
) -> Any:
    """Cross-entropy of a codebook head, by the arrays that make it."""
    logits = softlib.logits.VQLogits(hidden, codebook, mapping, **options)
    return softlib.losses.softmax_cross_entropy(logits, labels, where=where)
