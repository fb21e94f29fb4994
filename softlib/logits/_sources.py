"""The logits that losses accept: an array, or a value of this package."""

from jax.typing import ArrayLike
from jaxtyping import Array

from softlib import _checks as checks
from softlib._array_arguments import as_array

from ._blockwise import BlockwiseLogits
from ._linear import LinearLogits
from ._modifiers import checked_per_row
from ._stored import StoredLogits
from ._value import AbstractLogits

type Logits = Array | AbstractLogits
"""An array of logits (*batch, V), or a value that stands for one."""

type Source = LinearLogits | StoredLogits | BlockwiseLogits


def source_of(function: str, logits: Logits, name: str = "logits") -> Source:
    """The logits as a value, whose error messages begin with `function`."""
    if isinstance(logits, LinearLogits | StoredLogits | BlockwiseLogits):
        return logits.replaced(function=function)
    what = "an array, LinearLogits, StoredLogits or BlockwiseLogits"
    if isinstance(logits, AbstractLogits):
        got = type(logits).__name__
        raise TypeError(f"{function}: `{name}` must be {what}, got {got}.")
    return StoredLogits.of(function, as_array(function, name, logits, what), name=name)


def stored_source_of(
    function: str, logits: Logits, name: str = "logits"
) -> StoredLogits:
    """Stored logits, for a loss that needs the whole of each row."""
    source = source_of(function, logits, name)
    if isinstance(source, StoredLogits):
        return source
    raise TypeError(
        f"{function}: `{name}` must be an array or StoredLogits, got "
        f"{type(logits).__name__}: the loss needs the whole of each row, "
        "`materialize()` forms it."
    )


def array_source_of(function: str, logits: Logits) -> StoredLogits:
    """Stored logits, for a loss of arrays that has one implementation."""
    source = stored_source_of(function, logits)
    if source.implementation is not None:
        raise ValueError(
            f"{function}: `implementation` of the logits must be None, as there is "
            f"one, got {source.implementation!r}."
        )
    return source


def with_temperature(source: Source, temperature: ArrayLike) -> Source:
    """The source with a temperature given to the function, not to the logits."""
    if source.temperature is not None:
        raise ValueError(
            f"{source.function}: `temperature` of the logits must be None: the call "
            "has one of its own, which divides them."
        )
    checked = checked_per_row(
        source.function, "temperature", temperature, source.batch_shape, source.dtype
    )
    return source.replaced(modifiers=source.modifiers._replace(temperature=checked))


def require_per_class(source: Source, name: str, array: Array | None) -> None:
    """Requires a floating number per class, of this device's classes if divided."""
    checks.require_floating(source.function, **{name: array})
    shape, why = (source.own_classes,), "one per class"
    checks.require_shape(source.function, name, array, shape, why)
