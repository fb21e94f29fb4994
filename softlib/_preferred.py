"""The switch that sets the implementations of all calls that name none themselves.

Where a kernel does not compile (the machine's compiler is missing or faulty), a whole
program can be kept off kernels without changing any call.
"""

import contextlib
import os
from collections.abc import Iterator

import jax

# Read once, when the library is imported.
VARIABLE = "SOFTLIB_IMPLEMENTATIONS"
NAMES = ("xla", "reference", "pallas", "pallas_tpu", "pallas_gpu", "cudnn")

type Names = tuple[str, ...] | None


def _checked(origin: str, names: tuple[str, ...]) -> Names:
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"{origin}: a name must be one of {', '.join(NAMES)}, got {name!r}."
            )
    return names or None


def _of_environment() -> Names:
    text = os.environ.get(VARIABLE, "")
    return _checked(VARIABLE, tuple(n.strip() for n in text.split(",") if n.strip()))


# Part of the key of every jit cache: another value compiles functions again.
_PREFERRED = jax.make_user_context(_of_environment())


def names() -> Names:
    """The names in force, best first; None where nothing is preferred."""
    return _PREFERRED.value


@contextlib.contextmanager
def implementations(*names: str) -> Iterator[None]:
    """Makes calls without an `implementation` of their own use the named ones.

    For a machine on which a kernel does not compile: `"xla"` keeps a whole program off
    kernels. An operation takes the first of the names that supports its arguments, and
    plain JAX where it has an implementation under none of them; a call that passes
    `implementation` itself is not touched. What counts is the context in which a call
    is traced. A function compiled by `jax.jit` is compiled again where the context has
    changed.

    The environment variable `SOFTLIB_IMPLEMENTATIONS`, names divided by commas, does
    the same for a whole process. It is read when softlib is imported.

    Args:
        *names: `"xla"`, `"reference"`, `"pallas"`, `"pallas_tpu"`, `"pallas_gpu"` or
            `"cudnn"`, best first. None at all: softlib chooses, whatever was preferred
            outside.

    Returns:
        A context manager, which may also decorate a function.

    Raises:
        ValueError: A name is unknown.
        NotImplementedError: by a call inside, if none of the named ones can run.

    Derivatives: those of the implementations.
    Cost: none.

    Example:
        >>> x = jnp.zeros((2048, 1024), jnp.float32)
        >>> with softlib.implementations("xla"):
        ...     print(softlib.explain(softlib.softmax.softmax, x))
        softmax
          everywhere: xla
    """
    with _PREFERRED(_checked("implementations", names)):
        yield
