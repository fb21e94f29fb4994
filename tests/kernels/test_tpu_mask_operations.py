"""Every operation that a mask may take in kernels for TPUs is lowered there."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu import attention_mask
from pallas_kernels.tpu.attention_mask import missing

fraction = lambda q, k: (q - k) * 0.1
ONE = 127 << 23  # 1.0, as bits
as_float = lambda x: lax.bitcast_convert_type(x, jnp.float32)
EXAMPLES: dict[str, Callable[[Any, Any], Any]] = {
    "abs le": lambda q, k: lax.abs(q - k) <= 9,
    "and": lambda q, k: (q & k) < 3,
    "bitcast_convert_type": lambda q, k: as_float(q + ONE) < as_float(k + ONE),
    "clamp eq": lambda q, k: lax.clamp(jnp.int32(2), q - k, jnp.int32(9)) == 4,
    "clz gt": lambda q, k: lax.clz(q - k) > 9,
    "population_count xor": lambda q, k: lax.population_count(q ^ k) < 3,
    "div broadcast_in_dim": lambda q, k: lax.div(q - k, jnp.full_like(q - k, 3)) < 2,
    "rem select_n ne lt": lambda q, k: (q - k) % 3 != 0,
    "square ge": lambda q, k: lax.square(q - k) >= 99,
    "integer_pow": lambda q, k: (q - k) ** 3 < 99,
    "max min mul": lambda q, k: jnp.maximum(q, k) < jnp.minimum(q * k, 50),
    "neg not": lambda q, k: ~(-(q - k) < 9),
    "or add": lambda q, k: (q < 3) | (k + q < 4),
    "shifts": lambda q, k: ((q << 2) < k) & (((q - k) >> 1) < 3),
    "logical": lambda q, k: lax.shift_right_logical(q - k, jnp.full_like(q - k, 1)) < 3,
    "convert_element_type": lambda q, k: fraction(q, k) < 3.0,
    "sqrt": lambda q, k: jnp.sqrt((q * q + k * k) * 1.0) < 30.0,
    "floor round": lambda q, k: jnp.floor(fraction(q, k)) < jnp.round(fraction(k, q)),
    "exp log1p": lambda q, k: jnp.exp(fraction(q, k)) < jnp.log1p(jnp.abs(q - k) * 1.0),
    "log": lambda q, k: jnp.log(1.0 + jnp.abs(q - k)) < 2.0,
    "sin tanh": lambda q, k: jnp.sin(fraction(q, k)) < jnp.tanh(fraction(k, q)),
}


def test_all_of_them_are_in_the_examples():
    listed = attention_mask.OPERATIONS
    index = jax.ShapeDtypeStruct((8, 8), jnp.int32)
    text = " ".join(str(jax.make_jaxpr(f)(index, index)) for f in EXAMPLES.values())
    assert {
        name for name in listed if f" {name} " not in text.replace("[", " ")
    } == set()


def test_all_examples_are_taken():
    assert [name for name, mask in EXAMPLES.items() if missing(mask, 0)] == []


@pytest.mark.parametrize(
    ("mask", "lacks"),
    [
        (lambda q, k: q // 3 == k, ["sign"]),
        (lambda q, k: jnp.where(q < k, q < 5, k < 5), ["select_n of booleans"]),
        (lambda q, k: jnp.arange(9)[q] < k, ["gather", "iota"]),
        (lambda q, k: lax.fori_loop(0, 3, lambda i, x: x + i, q) < k, ["scan"]),
    ],
)
def test_others_are_named(mask, lacks):
    assert missing(mask, 0) == lacks


def every_example(interpret: bool) -> Any:
    def kernel(out):
        query = lax.broadcasted_iota(jnp.int32, (128, 1), 0)
        key = lax.broadcasted_iota(jnp.int32, (1, 128), 1)
        found = jnp.zeros((128, 128), jnp.int32)
        for mask in EXAMPLES.values():
            found = 3 * found + mask(query, key).astype(jnp.int32)
        out[...] = found

    shape = jax.ShapeDtypeStruct((128, 128), jnp.int32)
    return pl.pallas_call(kernel, out_shape=shape, interpret=interpret)()


def test_kernels_with_them_are_lowered_without_a_device():
    program = jax.jit(functools.partial(every_example, False))
    text = jax.export.export(program, platforms=["tpu"])().mlir_module()
    assert "tpu_custom_call" in text


def test_none_of_them_is_always_the_same():
    """Else the compiler would leave it out."""
    query, key = jnp.arange(128)[:, None], jnp.arange(128)[None]
    for name, mask in EXAMPLES.items():
        found = np.asarray(mask(query, key))
        assert found.any(), name
        assert not found.all(), name
