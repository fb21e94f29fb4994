"""Calls of the public functions, at the sizes of a small language model.

`scripts.operations_table` asks of each what runs on which device. Functions that differ
in nothing that decides it share a line; one of them is called.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from softlib import (
    LinearLogits,
    attention,
    logits,
    losses,
    masks,
    quantize,
    recurrent,
    softmax,
)
from softlib.decoding import speculative_verify

TOKENS, FEATURES, CLASSES, CODES = 4096, 1024, 50_304, 64
BATCH, LENGTH, HEADS, KEY_HEADS, HEAD_SIZE = 2, 2048, 8, 2, 128
CACHE, PAIRS, WINDOW = 8192, 256, 128

BF16, F32, INT = jnp.bfloat16, jnp.float32, jnp.int32

type Arrays = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Call:
    """A line of the table.

    Attributes:
        family: Under which it stands.
        name: Of the function, and what its arguments are besides the usual.
        function: Of the arrays, by name.
        arrays: Their shapes and dtypes.
        learned: Names of those that get a gradient; none if the function has none.
    """

    family: str
    name: str
    function: Callable[..., Any]
    arrays: Arrays
    learned: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.family}: {self.name}"


def calls() -> list[Call]:
    return [*_losses(), *_logits(), *_attention(), *_sequences(), *_softmax()]


def _array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# -------------------------------------------------------------------------------- heads
_WEIGHTS = {0: (CLASSES, FEATURES), 1: (FEATURES, CLASSES)}
_LABELS = _array(INT, TOKENS)


def _head(vocab_axis: int = 0, hidden: Any = BF16, weight: Any = BF16) -> Arrays:
    return {
        "hidden": _array(hidden, TOKENS, FEATURES),
        "weight": _array(weight, *_WEIGHTS[vocab_axis]),
        "labels": _LABELS,
    }


def _of_head(loss: Callable[..., Any], **head: Any) -> Callable[..., Any]:
    """A loss of the logits of a head, and of what else the arrays hold."""

    def call(hidden: Any, weight: Any, labels: Any, **arrays: Any) -> Any:
        own = {name: arrays.pop(name) for name in ("bias",) if name in arrays}
        made = LinearLogits(hidden, weight, **head, **own)
        return loss(made, labels, **arrays)

    return call


def _losses() -> Iterator[Call]:
    ce, of = losses.softmax_cross_entropy, functools.partial
    family = "losses of a head `LinearLogits(hidden, weight)`, hidden bfloat16"
    make = of(Call, family, learned=("hidden", "weight"))
    name = "`softmax_cross_entropy`"
    both = f"{name}, `linear_softmax_cross_entropy`"
    for axis, layout in ((0, "(V, D)"), (1, "(D, V)")):
        for dtype in (BF16, F32):
            yield make(
                f"{both}, {layout}, weight {dtype.dtype.name}",
                _of_head(ce, vocab_axis=axis),
                _head(axis, weight=dtype),
            )
    exact = _of_head(ce, precision="highest")
    yield make(
        f"{name}, weight float32, `precision='highest'`", exact, _head(weight=F32)
    )
    yield make(f"{name}, hidden and weight float32", _of_head(ce), _head(0, F32, F32))
    smoothed = of(ce, label_smoothing=0.1, logsumexp_penalty=1e-4)
    yield make(f"{name} with smoothing and penalty", _of_head(smoothed), _head())
    yield make(f"{name} with softcap", _of_head(ce, softcap=30.0), _head())
    bias = _array(F32, CLASSES)
    arrays = {**_head(), "bias": bias}
    learned = ("hidden", "weight", "bias")
    yield Call(family, f"{name} with bias", _of_head(ce), arrays, learned)
    arrays = {**_head(), "class_weights": bias}
    yield make(f"{name} with class weights", _of_head(ce), arrays)
    few = {**_head(), "hidden": _array(BF16, 32, FEATURES), "labels": _array(INT, 32)}
    yield make(f"{name} of 32 rows", _of_head(ce), few)

    yield make(
        "`softmax_cross_entropy_sum`",
        _of_head(losses.softmax_cross_entropy_sum),
        _head(),
    )
    for names, function in (
        ("`softmax_focal_loss`, `comp_sum_loss`", losses.softmax_focal_loss),
        ("`log_spherical_softmax_loss`, `z_loss`", losses.log_spherical_softmax_loss),
    ):
        yield make(names, _of_head(function), _head())
    for count in (8, 16):
        arrays = {**_head(), "labels": _array(INT, TOKENS, count)}
        multi = _of_head(losses.multi_label_cross_entropy)
        yield make(f"`multi_label_cross_entropy`, {count} labels", multi, arrays)
    robust = _of_head(of(losses.robust_softmax_cross_entropy, rho=0.1))
    arrays = {**_head(), "temperature": _array(F32, TOKENS)}
    yield make("`robust_softmax_cross_entropy`", robust, arrays)
    yield from _two_heads()
    yield from _other_heads()


def _two_heads() -> Iterator[Call]:
    def divergence(hidden: Any, weight: Any, teacher: Any, of_teacher: Any) -> Any:
        pair = LinearLogits(hidden, weight), LinearLogits(teacher, of_teacher)
        return losses.softmax_kl_divergence(*pair)

    hidden, weight, _ = _head().values()
    arrays = {
        "hidden": hidden,
        "weight": weight,
        "teacher": hidden,
        "of_teacher": weight,
    }
    family = "losses of other logits"
    name = "`softmax_kl_divergence` of two heads"
    yield Call(family, name, divergence, arrays, ("hidden", "weight"))


def _other_heads() -> Iterator[Call]:
    family = "losses of other logits"
    make = functools.partial(Call, family)
    ce = losses.softmax_cross_entropy

    def of_codes(hidden: Any, codebook: Any, mapping: Any, labels: Any) -> Any:
        return ce(logits.VQLogits(hidden, codebook, mapping), labels)

    hidden, weight, labels = _head().values()
    arrays = {
        "hidden": hidden,
        "codebook": _array(BF16, 8 * CODES, FEATURES),
        "mapping": _array(INT, CLASSES),
        "labels": labels,
    }
    yield make("`VQLogits`", of_codes, arrays, ("hidden", "codebook"))

    def of_change(
        hidden: Any, weight: Any, lora_a: Any, lora_b: Any, labels: Any
    ) -> Any:
        return ce(logits.LoRALogits(hidden, weight, lora_a, lora_b), labels)

    arrays = {
        "hidden": hidden,
        "weight": weight,
        "lora_a": _array(BF16, FEATURES, CODES),
        "lora_b": _array(BF16, CODES, CLASSES),
        "labels": labels,
    }
    yield make("`LoRALogits`", of_change, arrays, ("hidden", "lora_a", "lora_b"))

    def of_few_bits(hidden: Any, codes: Any, scale: Any, labels: Any) -> Any:
        few_bits = quantize.QuantizedArray(codes, bits=4, scale=scale)
        return ce(logits.QuantizedLogits(hidden, few_bits), labels)

    arrays = {
        "hidden": hidden,
        "codes": _array(INT, CLASSES, FEATURES),
        "scale": _array(BF16, CLASSES, FEATURES // 64),
        "labels": labels,
    }
    yield make("`QuantizedLogits`", of_few_bits, arrays, ("hidden", "scale"))

    def of_members(hidden: Any, weight: Any, other: Any, labels: Any) -> Any:
        members = [LinearLogits(hidden, weight), LinearLogits(hidden, other)]
        return ce(logits.FusedLogits(members, jnp.array([1.0, -0.5])), labels)

    arrays = {"hidden": hidden, "weight": weight, "other": weight, "labels": labels}
    yield make(
        "`FusedLogits`, `BlockwiseLogits`", of_members, arrays, ("hidden", "weight")
    )
    for dtype in (BF16, F32):
        stored = {"logits": _array(dtype, TOKENS, CLASSES), "labels": labels}
        name = f"an array of logits or `StoredLogits`, {dtype.dtype.name}"
        yield make(name, ce, stored, ("logits",))
    for names, function in (
        ("`stablemax_cross_entropy` of an array", losses.stablemax_cross_entropy),
        ("`sparsemax_loss`, `entmax_loss` of an array", losses.entmax_loss),
    ):
        yield make(names, function, stored, ("logits",))


def _logits() -> Iterator[Call]:
    make = functools.partial(Call, "functions of the logits of such a head")
    both = ("hidden", "weight")
    for function in (logits.row_statistics, logits.token_log_probs):
        yield make(f"`{function.__name__}`", _of_head(function), _head(), both)
    for function in (logits.entropy, logits.moments):
        call = _of_head(lambda made, labels, function=function: function(made))
        yield make(f"`{function.__name__}`", call, _head(), both)
    yield make(
        "`sequence_log_probs`", _of_head(logits.sequence_log_probs), _head(), both
    )
    for function in (logits.token_metrics, logits.top1_correct, logits.label_rank):
        yield make(f"`{function.__name__}`", _of_head(function), _head())
    top = _of_head(lambda made, labels: logits.top_k(made, k=8))
    yield make("`top_k`", top, _head())
    gather = _of_head(lambda made, labels: logits.gather(made, labels[:, None]))
    yield make("`gather`", gather, _head(), both)
    sample = _of_head(lambda made, labels: logits.sample(jax.random.key(0), made))
    yield make("`sample`", sample, _head())


# ---------------------------------------------------------------------------- attention
def _qkv(
    dtype: Any = BF16,
    heads: int = KEY_HEADS,
    features: int = HEAD_SIZE,
    **others: jax.ShapeDtypeStruct,
) -> Arrays:
    key = _array(dtype, BATCH, LENGTH, heads, features)
    query = _array(dtype, BATCH, LENGTH, HEADS, features)
    return {"query": query, "key": key, "value": key, **others}


_LEARNED = ("query", "key", "value")
_IDS = {"ids": _array(INT, BATCH, LENGTH)}
_LENGTHS = {"key_value_seq_lengths": _array(INT, BATCH)}
_KEEP = {"mask": _array(jnp.bool, BATCH, 1, 1, LENGTH)}
_BIAS = {"bias": _array(F32, 1, HEADS, LENGTH, LENGTH)}
_SINKS = {"sinks": _array(F32, HEADS)}
_OFFSET = {"query_offset": _array(INT, BATCH)}


def _attend(**options: Any) -> Callable[..., Any]:
    def call(ids: Any = None, **arrays: Any) -> Any:
        given = dict(options)
        if ids is not None:
            given["mask"] = masks.Segments(ids)
        return attention.dot_product_attention(**arrays, **given)

    return call


def _in_a_ring(**arrays: Any) -> Any:
    mesh = AbstractMesh((4,), ("sequence",), axis_types=(AxisType.Auto,))
    attend = functools.partial(
        attention.sequence_parallel_attention,
        axis_name="sequence",
        mask=masks.Causal(),
    )
    spec = PartitionSpec(None, "sequence")
    call = lambda query, key, value: attend(query, key, value)
    divided = jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    return divided(*(arrays[name] for name in _LEARNED))


def _attention() -> Iterator[Call]:
    family = "attention, bfloat16, two key heads of eight"
    make = functools.partial(Call, family, learned=_LEARNED)
    causal = _attend(is_causal=True)
    windowed = _attend(is_causal=True, local_window_size=WINDOW)
    yield make("`dot_product_attention`, `attention_fn`, every pair", _attend(), _qkv())
    yield make("causal", causal, _qkv())
    yield make("causal, float32", causal, _qkv(F32))
    yield make("causal, 80 features", causal, _qkv(features=80))
    yield make("causal window", windowed, _qkv())
    yield make("causal, lengths of the keys", causal, _qkv(**_LENGTHS))
    yield make("causal, segments", causal, _qkv(**_IDS))
    radial = _attend(mask=masks.Radial(LENGTH // 8))
    yield make("a mask of softlib, `Radial`", radial, _qkv(heads=HEADS))
    yield make("causal, boolean array over the keys", causal, _qkv(**_KEEP))
    yield make("causal, constant bias", causal, _qkv(**_BIAS))
    learned = (*_LEARNED, "bias")
    yield Call(family, "causal, learned bias", causal, _qkv(**_BIAS), learned)
    yield make("causal, softcap", _attend(is_causal=True, softcap=30.0), _qkv())
    yield make("causal, sinks", causal, _qkv(**_SINKS))
    yield make("causal, traced offset", causal, _qkv(**_OFFSET))
    both = _attend(is_causal=True, return_lse=True)
    yield make("causal, with the log-sums", both, _qkv())
    stablemax = _attend(is_causal=True, normalizer="stablemax")
    yield make("causal, `normalizer='stablemax'`", stablemax, _qkv())
    exact = _attend(is_causal=True, precision="highest")
    yield make("causal, `precision='highest'`", exact, _qkv())
    softplus = functools.partial(attention.softplus_attention, mask=masks.Causal())
    yield make("`softplus_attention`, causal", softplus, _qkv())
    own = functools.partial(softplus, normalize_qk=False)
    yield make("the same with `normalize_qk=False`", own, _qkv())
    pooled = {
        "queries": _array(BF16, 32, HEADS, HEAD_SIZE),
        "keys": _array(BF16, BATCH, LENGTH, KEY_HEADS, HEAD_SIZE),
        "values": _array(BF16, BATCH, LENGTH, KEY_HEADS, HEAD_SIZE),
        "weights": _array(F32, BATCH, LENGTH),
    }
    yield Call(
        family,
        "`weighted_pool` to 32 vectors",
        attention.weighted_pool,
        pooled,
        tuple(pooled),
    )
    parallel = "`sequence_parallel_attention`, causal, on a ring of devices"
    yield make(parallel, _in_a_ring, _qkv())
    yield from _decoding(family)
    yield from _tuples(family)


def _decoding(family: str) -> Iterator[Call]:
    query = _array(BF16, BATCH, 1, HEADS, HEAD_SIZE)
    cache = _array(BF16, BATCH, CACHE, KEY_HEADS, HEAD_SIZE)
    arrays = {"query": query, "key": cache, "value": cache, **_LENGTHS}
    decode = attention.decode_attention
    yield Call(family, "`decode_attention` of a cache", decode, arrays)
    unified = functools.partial(decode, phi=0.0)
    yield Call(family, "the same by a unified maximum", unified, arrays)


def _tuples(family: str) -> Iterator[Call]:
    query = _array(BF16, BATCH, LENGTH, HEADS, HEAD_SIZE)
    one = _array(BF16, BATCH, LENGTH, KEY_HEADS, HEAD_SIZE)
    names = ("key1", "key2", "value1", "value2")
    windows = functools.partial(
        attention.two_simplicial_attention, window1=WINDOW, window2=32
    )
    arrays = {"query": query, **dict.fromkeys(names, one)}
    learned = ("query", *names)
    yield Call(family, "`two_simplicial_attention`", windows, arrays, learned)

    def kronecker(query: Any, **arrays: Any) -> Any:
        keys, values = (
            [x for name, x in sorted(arrays.items()) if name.startswith(kind)]
            for kind in ("key", "value")
        )
        return attention.kronecker_attention(query, keys, values)

    for count in (2, 3):
        short = _array(BF16, BATCH, PAIRS if count == 2 else 32, KEY_HEADS, HEAD_SIZE)
        names = tuple(f"{kind}{i}" for kind in ("key", "value") for i in range(count))
        arrays = {"query": query, **dict.fromkeys(names, short)}
        name = f"`kronecker_attention`, {count} key axes"
        yield Call(family, name, kronecker, arrays, ("query", *names))


# ---------------------------------------------------------------------------- sequences
def _sequences() -> Iterator[Call]:
    family = "recurrences"
    names = "`linear_attention`, `normalized_attention`, `gated_linear_attention`"
    arrays = _qkv(heads=HEADS)
    yield Call(family, names, recurrent.linear_attention, arrays, _LEARNED)
    of_time = _array(F32, BATCH, LENGTH, FEATURES)
    arrays = {
        "u": of_time,
        "delta": of_time,
        "A": _array(F32, FEATURES, 16),
        "B": _array(F32, BATCH, LENGTH, 16),
        "C": _array(F32, BATCH, LENGTH, 16),
    }
    scan = recurrent.selective_scan
    name = "`selective_scan`, `quasi_lstm`, `linear_recurrence`"
    yield Call(family, name, scan, arrays, ("u", "delta", "A"))


# ------------------------------------------------------------------------------ softmax
def _softmax() -> Iterator[Call]:
    family = "maps of arrays, and draws"
    for dtype in (F32, BF16):
        x = {"x": _array(dtype, TOKENS, CLASSES)}
        for function in (softmax.softmax, softmax.logsumexp):
            name = f"`{function.__name__}`, {dtype.dtype.name}"
            yield Call(family, name, function, x, ("x",))
    x = {"x": _array(F32, TOKENS, CLASSES)}
    masked = {**x, "where": _array(jnp.bool, TOKENS, CLASSES)}
    yield Call(family, "`softmax` with `where`", softmax.softmax, masked, ("x",))
    first = functools.partial(softmax.softmax, axis=0)
    yield Call(family, "`softmax` over the first axis", first, x, ("x",))
    for names, function in (
        ("`log_softmax`, `stablemax`, `spherical_softmax`", softmax.log_softmax),
        ("`two_pass_softmax`, `unified_max_softmax`", softmax.two_pass_softmax),
        ("`sparsemax`, `entmax`, `normmax`", softmax.sparsemax),
        ("`top_k_softmax`", functools.partial(softmax.top_k_softmax, k=8)),
    ):
        yield Call(family, names, function, x, ("x",))
    top_p = functools.partial(softmax.top_p_logits, p=0.9)
    yield Call(family, "`top_k_logits`, `top_p_logits`, `min_p_logits`", top_p, x)
    draw = lambda x: softmax.gumbel_softmax(jax.random.key(0), x)
    yield Call(family, "`gumbel_softmax`", draw, x, ("x",))
    draft = {
        "logits": _array(F32, BATCH, 5, CLASSES),
        "draft_logits": _array(F32, BATCH, 4, CLASSES),
        "draft_tokens": _array(INT, BATCH, 4),
    }
    verify = lambda **arrays: speculative_verify(jax.random.key(0), **arrays)
    yield Call(family, "`speculative_verify`, `generate`, `beam_search`", verify, draft)
