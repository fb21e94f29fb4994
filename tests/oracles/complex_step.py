"""Gradients without cancellation: the imaginary part after an imaginary step."""

from collections.abc import Callable
from typing import Any

import numpy as np

STEP = 1e-40


def slope(function: Callable[[Any], Any], array: Any) -> np.ndarray:
    """The gradient of a number that an analytic function makes of an array.

    An entry that is not finite has none.
    """
    array = np.asarray(array, np.float64)
    found = np.zeros(array.shape)
    for place in np.ndindex(array.shape):
        if np.isfinite(array[place]):
            moved = array.astype(complex)
            moved[place] += 1j * STEP
            found[place] = np.imag(function(moved)) / STEP
    return found
