"""The value that `softlib.explain` returns, and how it reads."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, repr=False)
class ExplainedOperation:
    """The choice of an operation's implementation, and the reasons against others.

    Args:
        operation: Its name, such as `dot_product_attention`; a backward pass that has
            kernels of its own is an operation of its own.
        runs: Platform to implementation: `{"tpu": "pallas_tpu", "elsewhere": "xla"}`,
            or `{"everywhere": "xla"}`. Of one device its name to implementation:
            `{"h100": "pallas_gpu"}`.
        refused: Implementation to the reason why it cannot run; of those that would
            have come before what runs.
        notes: Implementation to what is worth knowing about running it on these
            arrays: its tiles, an option that saves no time there.

    Example:
        >>> x = jnp.zeros((2048, 1024), jnp.float32)
        >>> (found,) = softlib.explain(softlib.softmax.softmax, x).operations
        >>> print(found.operation, found.runs["tpu"])
        softmax pallas_tpu
    """

    operation: str
    runs: Mapping[str, str]
    refused: Mapping[str, str]
    notes: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{platform}: {name}" for platform, name in self.runs.items()]
        lines += [f"not {name}: {why}" for name, why in self.refused.items()]
        lines += [f"{name}: {note}" for name, note in self.notes.items()]
        return "\n  ".join([self.operation, *lines])

    __repr__ = __str__


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """The implementation that each operation of a call would use, as text or fields.

    `print(explanation)` and the last line of a notebook's cell show a paragraph per
    operation: its name, what runs on which platform, `not NAME: why` for what cannot,
    and notes.

    Args:
        operations: One `ExplainedOperation` per distinct choice, in the order in which
            they were met.

    Example:
        >>> x = jnp.zeros((4, 8), jnp.float32)
        >>> print(softlib.explain(jnp.sin, x))
        no operation of softlib was met
    """

    operations: tuple[ExplainedOperation, ...]

    def __str__(self) -> str:
        paragraphs = map(str, self.operations)
        return "\n".join(paragraphs) or "no operation of softlib was met"

    __repr__ = __str__
