"""Block-sparse attention on TPUs: causal, radial over a video, and its options.

The naive program stores the float32 scores of all pairs; flops are those of the pairs
that attend. Arguments and results have their heads first, (B, N, T, H), the layout that
the compiler gives them between projections and kernels; in the user's layout arguments
of a program are copied once more, which is no matter of the kernels.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import (
    attention as kernels,
    attention_key_gradient as of_keys,
    attention_query_gradient as of_queries,
)
from softlib import attention, masks
from softlib.attention._engine import kernels_tpu as adapter
from softlib.attention._engine.plan import plan_of
from softlib.attention._engine.scores import (
    Kind,
    LogSoftplus,
    Softmax,
    Softplus,
    StableMax,
)
from softlib.attention._engine.tiles import Operands, Options

from .attention_problems import CAUSAL, RADIAL, Problem, forward_and_training
from .case import TPUS, Case, array

_FAMILY = "attention"


def heads_first(function: Any) -> Any:
    """The same function of arrays whose heads come before positions, and back."""

    def turn(x: Any) -> Any:
        return jnp.swapaxes(x, 1, 2) if x.ndim > 2 else x

    def call(*arrays: Any) -> Any:
        return jax.tree.map(turn, function(*map(turn, arrays)))

    return call


RAGGED = Problem(
    *(masks.Window(700, 100), (5003, 6001), (6, 3)),
    features=(72, 80),
    batch=2,
)
# More blocks than one list holds.
LONG = Problem(masks.All(), (262_144, 262_144), (2, 1))
WIDE = dataclasses.replace(CAUSAL, dtype=jnp.float32, lengths=(4096, 4096))
# Keys and values without padding are copies.
LONG_RAGGED = dataclasses.replace(RAGGED, lengths=(20_003, 24_001))
SHORTER = dataclasses.replace(RAGGED, mask=masks.Window(700, None), batch=3)
RAGGED_WIDE = dataclasses.replace(RAGGED, dtype=jnp.float32)


def cases() -> list[Case]:
    through = [
        *_through_softlib("causal", CAUSAL),
        *_through_softlib("radial", RADIAL),
        *_through_softlib("ragged window", RAGGED),
        *_through_softlib("long", LONG),
        *_through_softlib("float32 causal", WIDE),
        *_through_softlib("float32 ragged window", RAGGED_WIDE),
        *_through_softlib("softcap", CAUSAL, softcap=50.0),
        *_through_softlib("softplus", CAUSAL, normalizer="softplus"),
        *_through_softlib("stablemax", CAUSAL, normalizer="stablemax"),
        *_with_sinks_and_lengths(),
        *_with_segments("segments", CAUSAL),
        *_with_segments("ragged segments", SHORTER),
    ]
    bare = [
        *_bare("causal", CAUSAL),
        *_bare("radial", RADIAL),
        *_bare("ragged window", RAGGED),
        *_bare("plain softplus", CAUSAL, Softplus()),
        *_bare("log softplus", RAGGED, LogSoftplus()),
        *_bare("stablemax", RAGGED, StableMax()),
    ]
    return [*through, *bare]


# ---------------------------------------------------------------------- through softlib
def _through_softlib(name: str, problem: Problem, **options: Any) -> list[Case]:
    def forward(query: Any, key: Any, value: Any) -> Any:
        return attention.dot_product_attention(
            *(query, key, value),
            mask=problem.mask,
            implementation="pallas_tpu",
            **options,
        )

    name = f"softlib {name}"
    return forward_and_training(name, problem, forward, problem.arrays, (), _case)


def _with_sinks_and_lengths() -> list[Case]:
    def forward(query: Any, key: Any, value: Any, sinks: Any, lengths: Any) -> Any:
        return attention.dot_product_attention(
            *(query, key, value),
            mask=LONG_RAGGED.mask,
            sinks=sinks,
            key_value_seq_lengths=lengths,
            implementation="pallas_tpu",
        )

    extra = (
        array(jnp.float32, LONG_RAGGED.heads[0]),
        array(jnp.int32, LONG_RAGGED.batch),
    )
    name = "softlib sinks and lengths"
    arrays = LONG_RAGGED.arrays
    return forward_and_training(name, LONG_RAGGED, forward, arrays, extra, _case)


def _with_segments(name: str, problem: Problem) -> list[Case]:
    """Sequences packed into one, each entry of the batch in its own way."""

    def forward(query: Any, key: Any, value: Any, ids: Any) -> Any:
        return attention.dot_product_attention(
            *(query, key, value),
            mask=problem.mask & masks.Segments(ids),
            implementation="pallas_tpu",
        )

    extra = (array(jnp.int32, problem.batch, max(problem.lengths)),)
    name, arrays = f"softlib {name}", problem.arrays
    return forward_and_training(name, problem, forward, arrays, extra, _case)


def _case(
    name: str, problem: Problem, function: Any, arguments: Any, **counts: Any
) -> Case:
    return case_of(name, problem, heads_first(function), arguments, **counts)


def case_of(
    name: str,
    problem: Problem,
    function: Any,
    arguments: tuple[Any, ...],
    *,
    products: int,
    moved: str,
) -> Case:
    return Case(
        *(_FAMILY, name, function, arguments, TPUS),
        naive_bytes=problem.naive_bytes,
        # Lengths that are no multiple of a register's rows are laid out anew, which
        # counts where they are short.
        most_temporaries=0.1 if problem.lengths == RAGGED.lengths else 0.02,
        flops=problem.flops(products),
        bytes_moved=problem.bytes_of(moved),
    )


# ----------------------------------------------------------------------- bare kernels
def _bare(name: str, problem: Problem, kind: Kind | None = None) -> list[Case]:
    """Each kernel by itself, as the engine calls it."""
    (h, e), (t, _), (n, _) = problem.features, problem.lengths, problem.heads
    per_row = array(jnp.float32, problem.batch, n, t)
    arguments = (*problem.arrays, per_row, per_row)
    options = Options(kind or Softmax(), h**-0.5, None, None, problem.dtype)

    def given(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
        """What is static, and what the lists of blocks are made from."""
        plan = plan_of(problem.mask, problem.lengths)
        operands = Operands(query, key, value, plan)
        return adapter.form_of(options, operands)[0], operands

    def forward(query: Any, key: Any, value: Any) -> Any:
        form, operands = given(query, key, value)
        tiles, entries = adapter.blocks_of("forward", options, operands)
        return kernels.attention(
            *(query, key, value, entries),
            form=form,
            tiles=tiles,
            out_dtype=problem.dtype,
        )

    def query_gradient(*arrays: Any) -> Any:
        call: Any = of_queries.query_gradient
        form, operands = given(*arrays[:3])
        tiles, entries = adapter.blocks_of("query", options, operands)
        return call(*arrays, entries, form=form, tiles=tiles, out_dtype=problem.dtype)

    def key_value_gradient(*arrays: Any) -> Any:
        call: Any = of_keys.key_value_gradient
        form, operands = given(*arrays[:3])
        tiles, entries = adapter.blocks_of("key", options, operands)
        out_dtypes = (problem.dtype,) * 2
        return call(*arrays, entries, form=form, tiles=tiles, out_dtypes=out_dtypes)

    case = functools.partial(_case, problem=problem)
    return [
        case(
            *(f"{name}, forward kernel",),
            function=forward,
            arguments=arguments[:3],
            products=h + e,
            moved="qkvor",
        ),
        case(
            *(f"{name}, query kernel",),
            function=query_gradient,
            arguments=arguments,
            products=2 * h + e,
            moved="qkvorrq",
        ),
        case(
            *(f"{name}, key kernel",),
            function=key_value_gradient,
            arguments=arguments,
            products=2 * (h + e),
            moved="qkvorrkv",
        ),
    ]
