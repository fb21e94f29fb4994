"""What the gradient filter of a kernel notes, without a kernel around it."""

from typing import Any

import numpy as np

from pallas_kernels.tpu import _row_filter
from pallas_kernels.tpu._row_math import LANES
from tests.host import jnp


def test_each_block_of_classes_has_a_lane_with_its_largest_distance():
    distance = np.random.default_rng(0).random((8, 2 * 128)).astype(np.float32)

    class Found:
        pass

    found: Any = Found()
    found.distance = jnp.asarray(distance)
    noted = np.zeros((8, LANES), np.float32)
    _row_filter.note_distance({"distance": noted}, slice(None), found)
    wanted = np.full((8, LANES), -1, np.float32)
    wanted[:, 0], wanted[:, 1] = distance[:, :128].max(1), distance[:, 128:].max(1)
    np.testing.assert_array_equal(noted, wanted)
