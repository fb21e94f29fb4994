"""Attention of few queries to long caches: batches, drafts, ragged caches.

The naive program stores the scores of all queries and keys, and the values that it
multiplies with them, in float32.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from softlib import attention

from .case import HOPPER, TPUS, Case, array

_FAMILY = "decode attention"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call.

    Attributes:
        batch: Sequences.
        keys: For which a cache has room.
        heads: Query heads and key heads.
        features: Of a key and of a value.
        queries: Of a sequence.
        dtype: Of all arrays.
        targets: Names of machines.
        options: Of `decode_attention`.
    """

    batch: int
    keys: int
    heads: tuple[int, int]
    features: tuple[int, int] = (128, 128)
    queries: int = 1
    dtype: Any = jnp.bfloat16
    targets: tuple[str, ...] = (*TPUS, *HOPPER)
    options: Any = dataclasses.field(default_factory=dict)


_UNIFIED = {"phi": 0.0}
_EVERYTHING = {
    "phi": 1.0,
    "valid_range": (-20.0, 20.0),
    "criterion": "elementwise",
    "softcap": 30.0,
    "is_causal": True,
}
_PROBLEMS = {
    "batch": Problem(64, 32_768, (32, 8)),
    "batch, unified maximum": Problem(64, 32_768, (32, 8), options=_UNIFIED),
    "one sequence": Problem(1, 131_072, (64, 8)),
    "one sequence, unified maximum": Problem(1, 131_072, (64, 8), options=_UNIFIED),
    "draft, all options": Problem(16, 16_384, (32, 4), queries=4, options=_EVERYTHING),
    "heads of their own": Problem(8, 8192, (32, 32), options=_UNIFIED),
    "one head of keys": Problem(32, 32_776, (16, 1)),
    "ragged": Problem(3, 5003, (21, 7), (96, 80), options=_UNIFIED, targets=TPUS),
    "ragged on a GPU": Problem(
        *(3, 5000, (21, 7), (64, 192)),
        dtype=jnp.float16,
        targets=HOPPER,
    ),
    "float32": Problem(
        *(16, 16_384, (32, 8)),
        dtype=jnp.float32,
        targets=TPUS,
        options=_UNIFIED,
    ),
}


def cases() -> list[Case]:
    return [_case(name, problem) for name, problem in _PROBLEMS.items()]


def _case(name: str, problem: Problem) -> Case:
    def decode(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        return attention.decode_attention(
            *(query, key, value),
            key_value_seq_lengths=lengths,
            implementation="pallas",
            return_lse=True,
            **problem.options,
        )

    (heads, groups), (size, width) = problem.heads, problem.features
    batch, keys, queries = problem.batch, problem.keys, problem.queries
    arguments = (
        array(problem.dtype, batch, queries, heads, size),
        array(problem.dtype, batch, keys, groups, size),
        array(problem.dtype, batch, keys, groups, width),
        array(jnp.int32, batch),
    )
    pairs = batch * heads * queries * keys
    moved = sum(x.size * x.dtype.itemsize for x in arguments)
    return Case(
        *(_FAMILY, name, decode, arguments, problem.targets),
        # A ragged cache is laid out anew, scores or not.
        naive_bytes=0 if name == "ragged" else 4 * (pairs + arguments[2].size),
        flops=2 * pairs * (size + width),
        bytes_moved=moved + batch * heads * queries * (4 + width * 2),
    )
