"""Attention to pairs of keys in two windows, as two_simplicial_attention runs it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softlib.attention import kronecker_attention, two_simplicial_attention
from softlib.masks import Between, Causal, PerAxis, Window

from .case import HOPPER, TPUS, Case, array

FAMILY = "trilinear attention"


class _Target(NamedTuple):
    """The implementation, its machines, and what is due to them."""

    implementation: str
    machines: tuple[str, ...]
    most_temporaries: float = 0.02
    spills: int = 0


# Heads are moved behind one another, which some compilers copy for. One register is
# spilled, on v5p, where keys have many heads.
_TPU = _Target("pallas_tpu", TPUS, 0.06, 1)
_GPU = _Target("pallas_gpu", HOPPER)


def cases() -> list[Case]:
    wide: dict[str, Any] = {
        "tokens": 8192,
        "windows": (512, 32),
        "heads": 8,
        "key_heads": 2,
    }
    ragged: dict[str, Any] = {
        "tokens": 8001,
        "windows": (500, 60),
        "heads": 6,
        "key_heads": 2,
    }
    sixteen = wide | {"heads": 16, "key_heads": 1}
    of_tpus = [
        *_pair("bfloat16", "bfloat16", **wide),
        *_pair("float32", "float32", **wide),
        *_pair("no shared keys", "bfloat16", **wide | {"key_heads": 8}),
        *_pair("sixteen query heads", "bfloat16", **sixteen),
        *_pair("wide features", "bfloat16", **wide | {"features": 256}),
        *_pair("ragged", "bfloat16", **ragged, features=64),
        *_pair("ragged float32", "float32", **ragged, features=100),
        *_joint("joint mask", _TPU),
    ]
    of_gpus = [
        *_pair("gpu bfloat16", "bfloat16", _GPU, **wide),
        *_pair("gpu float16", "float16", _GPU, **wide, features=64),
        *_pair("gpu no shared keys", "bfloat16", _GPU, **wide | {"key_heads": 8}),
        *_pair("gpu sixteen query heads", "bfloat16", _GPU, **sixteen),
        *_pair("gpu wide values", "bfloat16", _GPU, **wide, features=64, values=128),
        *_pair("gpu wide keys", "float16", _GPU, **ragged, values=64),
        *_pair("gpu ragged", "bfloat16", _GPU, **ragged, features=100),
        *_joint("gpu joint mask", _GPU),
        *_whole(),
    ]
    return [*of_tpus, *of_gpus]


def _pair(
    name: str,
    dtype: str,
    target: _Target = _TPU,
    *,
    tokens: int,
    windows: tuple[int, int],
    heads: int,
    key_heads: int,
    features: int = 128,
    values: int | None = None,
) -> list[Case]:
    attend = functools.partial(
        two_simplicial_attention,
        window1=windows[0],
        window2=windows[1],
        implementation=target.implementation,
    )
    query = array(dtype, 1, tokens, heads, features)
    key, value = (
        array(dtype, 1, tokens, key_heads, size)
        for size in (features, values or features)
    )
    tuples = tokens * heads * windows[0] * windows[1]
    return _both(name, attend, (query, key, key, value, value), tuples, target)


def _joint(name: str, target: _Target) -> list[Case]:
    """Every unordered pair once, not causal in one axis."""
    joint = Between(2, 1, Causal(-1))
    mask = PerAxis(Window(127, 128), Window(63, 0), joint=joint)

    def attend(query: Any, key1: Any, key2: Any, value1: Any, value2: Any) -> Any:
        return kronecker_attention(
            query,
            (key1, key2),
            (value1, value2),
            mask=mask,
            implementation=target.implementation,
        )

    query = array(jnp.bfloat16, 2, 4096, 4, 128)
    key = array(jnp.bfloat16, 2, 4096, 2, 128)
    tuples = 2 * 4096 * 4 * 256 * 64
    return _both(name, attend, (query, key, key, key, key), tuples, target)


def _whole() -> list[Case]:
    """Every pair, of both axes."""

    def attend(query: Any, key1: Any, key2: Any, value1: Any, value2: Any) -> Any:
        keys, values = (key1, key2), (value1, value2)
        return kronecker_attention(query, keys, values, implementation="pallas_gpu")

    arguments = (array(jnp.bfloat16, 1, 1024, 4, 128),) * 5
    return _both("gpu no mask", attend, arguments, 4 * 1024**3, _GPU)


def _both(
    name: str,
    attend: Any,
    arguments: tuple[jax.ShapeDtypeStruct, ...],
    tuples: int,
    target: _Target,
) -> list[Case]:
    def step(*arrays: Any) -> Any:
        total = lambda *arrays: attend(*arrays).astype(jnp.float32).sum()
        return jax.grad(total, argnums=range(5))(*arrays)

    moved = sum(x.size * x.dtype.itemsize for x in arguments)
    query, *_, value = arguments
    features, value_features = query.shape[-1], value.shape[-1]
    out = query.size // features * value_features * query.dtype.itemsize
    products = tuples * (features + value_features)
    common: dict[str, Any] = {
        "arguments": arguments,
        "targets": target.machines,
        "naive_bytes": 4 * tuples,
        "most_temporaries": target.most_temporaries,
        "spills": target.spills,
    }
    return [
        Case(
            FAMILY,
            f"{name}, forward",
            lambda *arrays: attend(*arrays),
            flops=2 * products,
            bytes_moved=moved + out,
            **common,
        ),
        # Two products forward, and six backward; the kernels take 3 + 4 + 4.
        Case(
            FAMILY,
            f"{name}, training step",
            step,
            flops=(2 + 6) * products,
            bytes_moved=3 * moved + 2 * out,
            **common,
        ),
    ]
