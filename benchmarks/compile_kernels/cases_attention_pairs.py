"""Attention on Hopper and on TPUs with arrays over pairs, and with packed sequences."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from softlib import attention, masks

from . import cases_gpu_attention as gpu, cases_tpu_attention as tpu
from .attention_problems import CAUSAL, Problem, forward_and_training
from .case import Case, array

# With 16 heads a copy of a boolean array as bytes is 1.6 % of the scores.
LONG = dataclasses.replace(CAUSAL, heads=(16, 4))
NARROW = Problem(masks.Window(500, 0), (8192, 8192), (16, 16), (64, 64), batch=2)


@dataclasses.dataclass(frozen=True)
class Platform:
    """The differences between the platforms.

    Attributes:
        prefix: Of the names of cases.
        implementation: The kernels.
        arrays: Query, key, value and the cotangent of the output, as programs take
            them.
        turn: Their arrays into the user's layout, and back.
        case: Makes a case.
    """

    prefix: str
    implementation: str
    arrays: Callable[[Problem], tuple[jax.ShapeDtypeStruct, ...]]
    turn: Callable[[Any], Any]
    case: Callable[..., Case]

    def attend(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        arrays = map(self.turn, (query, key, value))
        implementation = self.implementation
        return self.turn(
            attention.dot_product_attention(
                *arrays, implementation=implementation, **options
            )
        )


GPU = Platform("gpu softlib", "pallas_gpu", gpu.in_layout, lambda x: x, gpu.case_of)
TPU = Platform(
    *("softlib", "pallas_tpu", lambda problem: problem.arrays),
    *(lambda x: jnp.swapaxes(x, 1, 2), tpu.case_of),
)


def cases() -> list[Case]:
    return [
        *_cases(GPU, "array", LONG, dense="bts"),
        *_cases(GPU, "narrow array", NARROW, dense="bts"),
        *_cases(GPU, "bias", LONG, bias="nts"),
        *_cases(GPU, "narrow bias", NARROW, bias="nts"),
        *_cases(GPU, "float32 bias", LONG, bias="ts", dtype=jnp.float32, softcap=50.0),
        *_cases(GPU, "narrow float32 bias", NARROW, bias="ts", dtype=jnp.float32),
        *_cases(GPU, "ragged arrays of positions", gpu.RAGGED, dense="bs", bias="nt"),
        *_packed(GPU, "packed sequences", LONG),
        *_packed(GPU, "narrow packed sequences", NARROW),
        *_packed(GPU, "ragged packed sequences", gpu.RAGGED),
        # The float32 sums of the gradient, and the scores of a step.
        _trained(GPU, "trained bias", LONG, "ts", most_temporaries=0.3),
        *_cases(TPU, "array", LONG, dense="bts"),
        # 64 features are laid out anew in 128 lanes, and the booleans as bytes.
        *[
            dataclasses.replace(case, most_temporaries=0.08)
            for case in _cases(TPU, "narrow array", NARROW, dense="bts")
        ],
        *_cases(TPU, "bias", LONG, bias="nts"),
        *_cases(TPU, "float32 bias", tpu.WIDE, bias="ts", dtype=jnp.float32),
        *_cases(
            *(TPU, "ragged arrays", tpu.RAGGED),
            dense="bts",
            bias="nts",
            softcap=50.0,
            normalizer="softplus",
        ),
        *_cases(TPU, "ragged arrays of positions", tpu.SHORTER, dense="bns", bias="nt"),
        *_packed(TPU, "packed sequences from an offset", LONG),
        _trained(TPU, "trained bias", LONG, "ts", most_temporaries=0.4),
    ]


def _cases(
    platform: Platform,
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
        return platform.attend(
            *(query, key, value),
            mask=mask,
            bias=given.pop() if given else None,
            **options,
        )

    extra = []
    if dense is not None:
        extra.append(_on_pairs(problem, dense, jnp.bool_))
    if bias is not None:
        extra.append(_on_pairs(problem, bias, dtype))
    return _both(platform, name, problem, forward, *extra)


def _packed(platform: Platform, name: str, problem: Problem) -> list[Case]:
    """Segments of traced ids, from a traced offset of the queries."""

    def forward(query: Any, key: Any, value: Any, ids: Any, offset: Any) -> Any:
        mask = masks.Segments(ids) & problem.mask
        return platform.attend(query, key, value, mask=mask, query_offset=offset)

    extra = (
        array(jnp.int32, problem.batch, max(problem.lengths)),
        array(jnp.int32, problem.batch),
    )
    return _both(platform, name, problem, forward, *extra)


def _both(
    platform: Platform, name: str, problem: Problem, forward: Any, *extra: Any
) -> list[Case]:
    """Forward, and training."""
    name, arrays = f"{platform.prefix} {name}", platform.arrays(problem)
    return forward_and_training(name, problem, forward, arrays, extra, platform.case)


def _trained(
    platform: Platform, name: str, problem: Problem, bias: str, most_temporaries: float
) -> Case:
    """The gradient of the bias too, which is plain JAX in large steps."""

    def training(query: Any, key: Any, value: Any, bias: Any) -> Any:
        def loss(query: Any, key: Any, value: Any, bias: Any) -> Any:
            out = platform.attend(query, key, value, mask=problem.mask, bias=bias)
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2, 3))(query, key, value, bias)

    arrays, (h, e) = platform.arrays(problem)[:3], problem.features
    made = platform.case(
        *(f"{platform.prefix} {name}, training", problem, training),
        (*arrays, _on_pairs(problem, bias, jnp.bfloat16)),
        products=5 * h + 5 * e,
        moved="qkvorqkvooqkvqkvorqkv",
    )
    return dataclasses.replace(made, most_temporaries=most_temporaries)


def _on_pairs(problem: Problem, axes: str, dtype: Any) -> jax.ShapeDtypeStruct:
    (t, s), (n, _) = problem.lengths, problem.heads
    sizes = {"b": problem.batch, "n": n, "t": t, "s": s}
    return array(dtype, *(size if axis in axes else 1 for axis, size in sizes.items()))
