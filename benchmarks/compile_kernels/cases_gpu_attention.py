"""Block-sparse attention on Hopper: causal, radial over a video, and its options.

The naive program stores the float32 scores of all pairs; flops are those of the pairs
that attend.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_mosaic import (
    attention as forward_pass,
    attention_backward as backward_pass,
    attention_key_gradients as of_keys,
)
from softlib import attention, masks
from softlib.attention._engine import kernels_gpu as adapter
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
from .case import HOPPER, Case, array

_FAMILY = "attention"
# Lengths and features that TMA cannot address: arrays are padded.
RAGGED = Problem(
    *(masks.Window(700, 100), (20_003, 24_001), (6, 3)),
    features=(72, 80),
    batch=2,
)
# A frame of 300 tokens, whose bands drop frames by a divisor that is no power of two.
DROPPED = Problem(
    *(masks.Radial(300, rule="pow2", min_window=96), (16_384, 16_384), (16, 4)),
    dtype=jnp.float16,
)
BANDS = ~masks.Window(100, 3) & masks.Dilated(3) | masks.GlobalTokens(0, 7)
MIXED = Problem(BANDS, (4096, 4096), (16, 4), (64, 64))
LATENT = Problem(masks.Causal(), (8192, 8192), (16, 16), (192, 128))
WIDE = Problem(masks.Causal(), (8192, 8192), (8, 4), (256, 256))


def cases() -> list[Case]:
    through = [
        *_through_softlib("causal", CAUSAL),
        *_through_softlib("radial", RADIAL),
        *_through_softlib("ragged window", RAGGED),
        *_through_softlib("latent", LATENT),
        *_through_softlib("wide", WIDE),
        *_through_softlib("softcap", CAUSAL, softcap=50.0),
        *_through_softlib("softplus", CAUSAL, normalizer="softplus"),
        *_through_softlib("stablemax", CAUSAL, normalizer="stablemax"),
        *_with_sinks_and_lengths(),
    ]
    bare = [
        # Other shapes than above: a process compiles a kernel, and tells of it, once.
        *_bare("causal", dataclasses.replace(CAUSAL, batch=2)),
        *_bare("radial", dataclasses.replace(RADIAL, heads=(12, 12))),
        *_bare("dropped frames", DROPPED, softcap=30.0),
        *_bare("mixed masks", MIXED),
        *_bare("plain softplus", CAUSAL, Softplus()),
        *_bare("log softplus of dropped frames", DROPPED, LogSoftplus(), softcap=30.0),
        *_bare("stablemax radial", RADIAL, StableMax()),
        # As in a ring, whose steps are added up.
        *_bare("float32 results", dataclasses.replace(CAUSAL, batch=3), is_wide=True),
        *_bare(
            *("float32 results of a softcap", dataclasses.replace(LATENT, batch=2)),
            softcap=30.0,
            is_wide=True,
        ),
        *_bare("wide float32 results", WIDE, is_wide=True),
    ]
    return [*through, *bare]


def in_layout(problem: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Query, key, value, and the cotangent of the output, in the user's layout."""
    turned = ((x.dtype, x.shape) for x in problem.arrays)
    return tuple(array(dtype, b, t, n, h) for dtype, (b, n, t, h) in turned)


# ---------------------------------------------------------------------- through softlib
def _through_softlib(name: str, problem: Problem, **options: Any) -> list[Case]:
    def forward(query: Any, key: Any, value: Any) -> Any:
        return attention.dot_product_attention(
            *(query, key, value),
            mask=problem.mask,
            implementation="pallas_gpu",
            **options,
        )

    name, arrays = f"gpu softlib {name}", in_layout(problem)
    return forward_and_training(name, problem, forward, arrays, (), case_of)


def _with_sinks_and_lengths() -> list[Case]:
    def forward(query: Any, key: Any, value: Any, sinks: Any, lengths: Any) -> Any:
        return attention.dot_product_attention(
            *(query, key, value),
            mask=RAGGED.mask,
            sinks=sinks,
            key_value_seq_lengths=lengths,
            implementation="pallas_gpu",
        )

    extra = (array(jnp.float32, RAGGED.heads[0]), array(jnp.int32, RAGGED.batch))
    name, arrays = "gpu softlib sinks and lengths", in_layout(RAGGED)
    return forward_and_training(name, RAGGED, forward, arrays, extra, case_of)


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
        *(_FAMILY, name, function, arguments, HOPPER),
        naive_bytes=problem.naive_bytes,
        flops=problem.flops(products),
        bytes_moved=problem.bytes_of(moved),
    )


# ----------------------------------------------------------------------- bare kernels
def _bare(
    name: str,
    problem: Problem,
    kind: Kind | None = None,
    softcap: float | None = None,
    *,
    is_wide: bool = False,
) -> list[Case]:
    """Each kernel by itself, as the engine calls it; `is_wide` for float32 results."""
    (h, e), (t, _), (n, _) = problem.features, problem.lengths, problem.heads
    per_row = array(jnp.float32, problem.batch, n, t)
    arguments = (*in_layout(problem), per_row, per_row)
    options = Options(
        *(kind or Softmax(), h**-0.5, softcap, None),
        out_dtype=jnp.dtype(jnp.float32 if is_wide else problem.dtype),
        wide_gradients=is_wide,
    )

    def given(which: Any, query: Any, key: Any, value: Any) -> tuple[Any, Any]:
        """The lists of tiles, and what is static."""
        plan = plan_of(problem.mask, problem.lengths)
        operands = Operands(query, key, value, plan)
        form, _ = adapter.form_of(options, operands)
        static = {"form": form, "tiles": adapter.tiles_of(which, options, operands)}
        if which == "forward":
            static["out_dtype"] = options.out_dtype
        else:
            static["is_wide"] = is_wide
        return adapter.lists_of(which, options, operands), static

    def forward(query: Any, key: Any, value: Any) -> Any:
        lists, static = given("forward", query, key, value)
        return forward_pass.attention(query, key, value, lists, **static)

    def query_gradient(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        lists, static = given("query", query, key, value)
        arrays = (query, key, value, *rest, lists)
        return backward_pass.query_gradient(*arrays, **static)

    def key_gradients(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        lists, static = given("key", query, key, value)
        arrays = (query, key, value, *rest, lists)
        return of_keys.key_gradients(*arrays, **static)

    case = functools.partial(case_of, problem=problem)
    return [
        case(
            f"gpu {name}, forward kernel",
            function=forward,
            arguments=arguments[:3],
            products=h + e,
            moved="qkvor",
        ),
        case(
            f"gpu {name}, query kernel",
            function=query_gradient,
            arguments=arguments,
            products=2 * h + e,
            moved="qkvorrq",
        ),
        case(
            f"gpu {name}, key kernel",
            function=key_gradients,
            arguments=arguments,
            products=2 * (h + e),
            moved="qkvorrkv",
        ),
    ]
