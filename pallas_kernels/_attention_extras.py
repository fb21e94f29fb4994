"""Arrays that attention kernels read besides queries, keys and values."""

from typing import Any, Literal, NamedTuple

import jax

# `mask` is an argument of the mask.
type Role = Literal["dense", "bias", "mask"]


class Extras(NamedTuple):
    """The arrays; None for none. Kernels say which dtypes and sizes they take.

    Those over pairs are (b, n, t, s), each axis of full length or 1: they are read in
    their own shape.

    Attributes:
        dense: 0 where a pair does not attend.
        bias: Added to the scores.
        queries: (b, m, T), int32: arguments of the mask per query, after its scalars.
        keys: (b, m, S), int32: those per key, after those per query.
    """

    dense: jax.Array | None = None
    bias: jax.Array | None = None
    queries: jax.Array | None = None
    keys: jax.Array | None = None

    @property
    def given(self) -> list[tuple[Role, tuple[bool, bool], Any]]:
        """Role of each array, whether it varies over queries and over keys, and it."""
        of_pairs: list[tuple[Role, Any]] = [("dense", self.dense), ("bias", self.bias)]
        found: list[tuple[Role, tuple[bool, bool], Any]] = [
            (role, (x.shape[2] != 1, x.shape[3] != 1), x)
            for role, x in of_pairs
            if x is not None
        ]
        if self.queries is not None:
            found.append(("mask", (True, False), self.queries))
        if self.keys is not None:
            found.append(("mask", (False, True), self.keys))
        return found


NOTHING = Extras()
