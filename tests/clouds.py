"""Rows in clouds that are far apart, for what assigns rows to codes."""

import numpy as np

from tests.host import jnp


def clouds(seed=0, rows=60, features=3, centres=4):
    """Rows (rows, features) around so many centres, and the centre of each."""
    random = np.random.default_rng(seed)
    place = 100 * random.normal(size=(centres, features))
    own = np.arange(rows) % centres
    return jnp.float32(place[own] + random.normal(size=(rows, features))), own
