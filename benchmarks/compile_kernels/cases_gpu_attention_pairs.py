"""Attention on Hopper with arrays over pairs, and with packed sequences."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from softlib import attention, masks

from .attention_problems import CAUSAL, Problem, forward_and_training
from .case import Case, array
from .cases_gpu_attention import RAGGED, case_of, in_layout

# With 16 heads a copy of a boolean array as bytes is 1.6 % of the scores.
LONG = dataclasses.replace(CAUSAL, heads=(16, 4))
NARROW = Problem(masks.Window(500, 0), (8192, 8192), (16, 16), (64, 64), batch=2)


def cases() -> list[Case]:
    return [
        *_cases("array", LONG, dense="bts"),
        *_cases("narrow array", NARROW, dense="bts"),
        *_cases("bias", LONG, bias="nts"),
        *_cases("narrow bias", NARROW, bias="nts"),
        *_cases("float32 bias", LONG, bias="ts", dtype=jnp.float32, softcap=50.0),
        *_cases("narrow float32 bias", NARROW, bias="ts", dtype=jnp.float32),
        *_cases("ragged arrays of positions", RAGGED, dense="bs", bias="nt"),
        *_packed("packed sequences", LONG),
        *_packed("narrow packed sequences", NARROW),
        *_packed("ragged packed sequences", RAGGED),
        _trained("trained bias", LONG, "ts"),
    ]


def _cases(
    name: str,
    problem: Problem,
    *,
    dense: str | None = None,
    bias: str | None = None,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> list[Case]:
    """`dense` and `bias`: the axes of the array, out of "bnts"; None for none."""

    def forward(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        given = list(rest)
        mask = problem.mask if dense is None else (problem.mask, given.pop(0))
        return attention.dot_product_attention(
            *(query, key, value),
            mask=mask,
            bias=given.pop() if given else None,
            implementation="pallas_gpu",
            **options,
        )

    extra = []
    if dense is not None:
        extra.append(_on_pairs(problem, dense, jnp.bool_))
    if bias is not None:
        extra.append(_on_pairs(problem, bias, dtype))
    name, arrays = f"gpu softlib {name}", in_layout(problem)
    return forward_and_training(name, problem, forward, arrays, tuple(extra), case_of)


def _packed(name: str, problem: Problem) -> list[Case]:
    """Segments of traced ids, from a traced offset of the queries."""

    def forward(query: Any, key: Any, value: Any, ids: Any, offset: Any) -> Any:
        return attention.dot_product_attention(
            *(query, key, value),
            mask=masks.Segments(ids) & problem.mask,
            query_offset=offset,
            implementation="pallas_gpu",
        )

    extra = (
        array(jnp.int32, problem.batch, max(problem.lengths)),
        array(jnp.int32, problem.batch),
    )
    name, arrays = f"gpu softlib {name}", in_layout(problem)
    return forward_and_training(name, problem, forward, arrays, extra, case_of)


def _trained(name: str, problem: Problem, bias: str) -> Case:
    """The gradient of the bias too, which is plain JAX in large steps."""

    def training(query: Any, key: Any, value: Any, bias: Any) -> Any:
        def loss(query: Any, key: Any, value: Any, bias: Any) -> Any:
            out = attention.dot_product_attention(
                *(query, key, value),
                mask=problem.mask,
                bias=bias,
                implementation="pallas_gpu",
            )
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2, 3))(query, key, value, bias)

    arguments = (*in_layout(problem)[:3], _on_pairs(problem, bias, jnp.bfloat16))
    h, e = problem.features
    made = case_of(
        *(f"gpu softlib {name}, training", problem, training, arguments),
        products=5 * h + 5 * e,
        moved="qkvorqkvooqkvqkvorqkv",
    )
    # The float32 sums of the gradient, and the scores of a step.
    return dataclasses.replace(made, most_temporaries=0.3)


def _on_pairs(problem: Problem, axes: str, dtype: Any) -> jax.ShapeDtypeStruct:
    (t, s), (n, _) = problem.lengths, problem.heads
    sizes = {"b": problem.batch, "n": n, "t": t, "s": s}
    return array(dtype, *(size if axis in axes else 1 for axis, size in sizes.items()))
