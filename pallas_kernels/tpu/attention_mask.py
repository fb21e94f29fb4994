"""The masks that kernels for TPUs can evaluate, by their operations."""

from pallas_kernels import _mask_operations
from pallas_kernels._mask_operations import Mask

# Of integers, floats and booleans: each was compiled, for v4 and v5e. Not here: `sign`,
# and so `//`, which cannot be lowered before the device is known.
_NAMES = """
    abs add and bitcast_convert_type broadcast_in_dim clamp clz convert_element_type div
    eq exp floor ge gt integer_pow le log log1p lt max min mul ne neg not or
    population_count rem round select_n shift_left shift_right_arithmetic
    shift_right_logical sin sqrt square sub tanh xor
"""
OPERATIONS = frozenset(_NAMES.split())


def missing(mask: Mask, scalars: int) -> list[str]:
    """Operations of the mask that kernels lack; `scalars` as in `Masking`."""
    return _mask_operations.missing(mask, scalars, OPERATIONS)
