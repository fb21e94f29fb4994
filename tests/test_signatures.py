"""Rules over the parameters of everything public: one word and one place for a thing.

A user who knows one function can call the next. Constructors of dataclasses and named
tuples list fields, which have an order, and are not asked for theirs.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from tests import public_names

# Numbers whose meaning a call does not show without the name.
KEYWORD_ONLY = {
    "epsilon",
    "implementation",
    "is_causal",
    "k",
    "num_samples",
    "num_steps",
    "order",
    "p",
    "precision",
    "scale",
    "softcap",
    "temperature",
    "top_k",
}


# Where `jax.nn` and `jax.random` have it: after an array, or after a key and an array.
AXIS_AFTER = ([], ["key"])


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions, methods, and constructors that are written out."""
    for public in public_names.public_names():
        if inspect.isfunction(public.value):
            yield public.address, public.value
        elif isinstance(public.value, type):
            members = dict(public_names.public_methods(public.value))
            if "__init__" in vars(public.value) and is_written(public.value.__init__):
                members["__init__"] = public.value.__init__
            for name, member in members.items():
                if not isinstance(member, property):
                    function = getattr(member, "__func__", member)
                    yield f"{public.address}.{name}", function


def is_written(function: Callable[..., Any]) -> bool:
    """Whether it stands in a file, and was not made by `dataclasses`."""
    return inspect.unwrap(function).__code__.co_filename.endswith(".py")


def positional(function: Callable[..., Any]) -> list[str]:
    """Parameters that a call may give by their place."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("self", "cls") and p.kind is p.POSITIONAL_OR_KEYWORD
    ]


FUNCTIONS = dict(functions())


def test_functions_methods_and_constructors_are_found():
    names = ("softmax.softmax", "LinearLogits.__init__", "nn.OutputHead.__init__")
    assert {f"softlib.{name}" for name in names} <= FUNCTIONS.keys()
    assert "softlib.losses.FactoredSphericalState.sgd_step" in FUNCTIONS
    assert "softlib.masks.Causal.__init__" not in FUNCTIONS


def test_options_whose_meaning_a_call_does_not_show_are_keywords():
    found = {
        name: sorted(unnamed)
        for name, function in FUNCTIONS.items()
        if (unnamed := {p for p in positional(function) if is_option(p)})
    }
    assert not found, "must be keyword-only"


def is_option(parameter: str) -> bool:
    return parameter in KEYWORD_ONLY or parameter.endswith("_temperature")


def test_the_axis_is_a_keyword_or_the_last_after_the_array():
    found = {
        name: given
        for name, function in FUNCTIONS.items()
        if "axis" in (given := positional(function))
        and (given[-1] != "axis" or given[:-2] not in AXIS_AFTER)
    }
    assert not found, "`axis` must be keyword-only"


# What a thing is called elsewhere, and its word here. `gradient_filter_eps` keeps
# `eps`, the name of that option in the literature.
OTHER_WORDS = {
    "causal": "is_causal",
    "eps": "epsilon",
    "iterations": "num_steps",
    "logit_scale": "scale",
    "logit_softcap": "softcap",
    "logp": "log_prob",
    "logps": "log_prob",
    "max_iterations": "max_steps",
    "num": "num_samples",
    "num_iterations": "num_steps",
    "ref_logits": "reference_logits",
    "steps": "num_steps",
    "target_logits": "teacher_logits",
}


def names() -> Iterator[tuple[str, set[str]]]:
    """Parameters of functions, and fields of values."""
    for name, function in FUNCTIONS.items():
        yield name, set(inspect.signature(function).parameters)
    for public in public_names.public_names():
        if is_fields(public.value):
            yield public.address, set(public.value._fields)
        elif isinstance(public.value, type) and dataclasses.is_dataclass(public.value):
            fields = dataclasses.fields(public.value)
            yield public.address, {field.name for field in fields}


def test_a_thing_has_one_word():
    found = {
        name: {word: OTHER_WORDS[word] for word in words}
        for name, own in names()
        if (words := OTHER_WORDS.keys() & own)
    }
    assert not found


# What `softlib.logits` asks values for; users have `row_statistics` and `top_k`.
ASKED_BY_FUNCTIONS = ("chained_statistics", "top_classes")


def results(function: Callable[..., Any]) -> list[Any]:
    """The types of which the annotation of the result is a union, or its only one."""
    annotation = inspect.signature(function).return_annotation
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return list(typing.get_args(annotation)) if is_union else [annotation]


def is_several(result):
    """A tuple of any length is one result."""
    return typing.get_origin(result) is tuple and ... not in typing.get_args(result)


def test_several_results_have_names():
    found = [
        name
        for name, function in FUNCTIONS.items()
        if any(is_several(result) for result in results(function))
        and not name.endswith(ASKED_BY_FUNCTIONS)
    ]
    assert not found, "must return a NamedTuple"


def test_a_flag_is_called_after_the_field_that_it_adds():
    """`return_lse` adds `lse`; `return_statistics` adds more than one field."""
    found, flags = {}, 0
    for name, function in FUNCTIONS.items():
        added = [result._fields for result in results(function) if is_fields(result)]
        for parameter in inspect.signature(function).parameters:
            if parameter.startswith("return_"):
                flags += 1
                field = parameter.removeprefix("return_")
                more = 3 if field == "statistics" else 2
                if not any(len(own) >= more and is_in(field, own) for own in added):
                    found[name] = parameter
    assert not found
    assert flags > 15


def is_fields(result: Any) -> bool:
    return isinstance(result, type) and public_names.is_named_tuple(result)


def is_in(field: str, fields: tuple[str, ...]) -> bool:
    return fields[0] in ("output", "loss") and field in ("statistics", *fields[1:])
