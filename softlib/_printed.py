"""The printed form of masks' and logits' arguments."""

from typing import Any


def argument(value: Any) -> str:
    """Prints an array as its dtype and shape: it is data, and may be traced."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return repr(value)
