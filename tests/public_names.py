"""What softlib offers to its users, found by walking `__all__`."""

import dataclasses
import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from typing import Any

from flax import linen


@dataclasses.dataclass(frozen=True)
class PublicName:
    package: str
    name: str
    value: Any

    @property
    def address(self) -> str:
        return f"{self.package}.{self.name}"


def packages() -> list[str]:
    """The library itself and every public module or package below it."""
    root = importlib.import_module("softlib")
    below = (m.name for m in pkgutil.iter_modules(root.__path__))
    return ["softlib", *(f"softlib.{name}" for name in below if name[0] != "_")]


def public_names() -> Iterator[PublicName]:
    """Functions, classes and type aliases; not the subpackages, not `__version__`."""
    for package in packages():
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType | str):
                yield PublicName(package, name, value)


def public_methods(cls: type) -> dict[str, Any]:
    """Methods and properties that the class itself defines."""
    kinds = (types.FunctionType, classmethod, staticmethod, property)
    fields = getattr(cls, "__dataclass_fields__", {})  # the default may be a function
    own = {"setup"} if issubclass(cls, linen.Module) else set()
    return {
        name: member
        for name, member in vars(cls).items()
        if isinstance(member, kinds)
        and (name[0] != "_" or name == "__call__")
        and name not in fields.keys() | own
    }


def is_of_text(public: PublicName) -> bool:
    """Whether a function of logs takes text, files or columns of them, never arrays."""
    signature = inspect.signature(inspect.unwrap(public.value))
    taken = (str(p.annotation) for p in signature.parameters.values())
    return public.package == "softlib.logs" and not any("Array" in t for t in taken)


def is_named_tuple(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def parameters(value: Any) -> list[str]:
    """Of a call of the function or class."""
    hidden = {"self", "cls"}
    if isinstance(value, type):
        if value.__init__ is object.__init__:
            return []
        if issubclass(value, linen.Module):  # flax adds two to every module
            hidden |= {"parent", "name"}
        value = value.__init__  # a metaclass may hide the signature of the class
    return [name for name in inspect.signature(value).parameters if name not in hidden]
