"""Says whether programs are still those of another commit, before they are compiled.

Lowers a set of programs for CPUs, TPUs and GPUs and keeps a hash of each text, without
names of functions and places in files. Two commits whose hashes are equal give the
compiler the same programs, but for the code of kernels for GPUs, which is left out:
compare `pallas_kernels/` itself.

    python -m scripts.lowered_programs before.json            # writes hashes
    python -m scripts.lowered_programs after.json before.json # and compares
"""

import argparse
import functools
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.extend import source_info_util

import softlib
from pallas_kernels import _devices

ROOT = pathlib.Path(softlib.__file__).resolve().parent.parent
PLATFORMS = ("cpu", "tpu", "cuda")
ROWS, FEATURES, CLASSES = 2048, 1024, 32768

type Arrays = dict[str, Any]
type Program = Callable[[Arrays], Any]

# What belongs to a head and not to the loss of its logits.
OF_HEAD = {
    "vocab_axis",
    "bias",
    "scale",
    "softcap",
    "temperature",
    "class_where",
    "vocab_chunk",
    "token_chunk",
    "gradient_filter_eps",
    "axis_name",
    "precision",
    "implementation",
}

# Function of a linear head, its successor for any logits, names of its arguments after
# the head, options.
HEADS: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = [
    ("linear_softmax_cross_entropy", "softmax_cross_entropy", ("labels",), {}),
    (
        "linear_softmax_cross_entropy",
        "softmax_cross_entropy",
        ("labels",),
        {"label_smoothing": 0.1, "logsumexp_penalty": 1e-4},
    ),
    (
        "linear_softmax_cross_entropy_sum",
        "softmax_cross_entropy_sum",
        ("labels",),
        {},
    ),
    ("linear_softmax_focal_loss", "softmax_focal_loss", ("labels",), {}),
    ("linear_comp_sum_loss", "comp_sum_loss", ("labels",), {"tau": 1.5}),
    (
        "linear_generalized_cross_entropy_loss",
        "generalized_cross_entropy_loss",
        ("labels",),
        {},
    ),
    ("linear_mean_absolute_error_loss", "mean_absolute_error_loss", ("labels",), {}),
    ("linear_poly1_cross_entropy", "poly1_cross_entropy", ("labels",), {}),
    ("linear_symmetric_cross_entropy", "symmetric_cross_entropy", ("labels",), {}),
    ("linear_z_loss", "z_loss", ("labels",), {"a": 1.0, "b": 2.0}),
    (
        "linear_log_spherical_softmax_loss",
        "log_spherical_softmax_loss",
        ("labels",),
        {},
    ),
    ("linear_log_taylor_softmax_loss", "log_taylor_softmax_loss", ("labels",), {}),
    ("linear_spherical_squared_error", "spherical_squared_error", ("labels",), {}),
    (
        "linear_robust_softmax_cross_entropy",
        "robust_softmax_cross_entropy",
        ("labels", "temperature"),
        {"rho": 8.0},
    ),
    ("linear_multi_label_cross_entropy", "multi_label_cross_entropy", ("several",), {}),
    ("linear_one_versus_all_loss", "one_versus_all_loss", ("several",), {}),
    ("linear_decoupled_softmax_loss", "decoupled_softmax_loss", ("several",), {}),
    ("linear_row_statistics", "row_statistics", ("labels",), {}),
    ("linear_entropy", "softmax_entropy", (), {}),
    ("linear_token_log_probs", "softmax_token_log_probs", ("labels",), {}),
    ("linear_token_metrics", "softmax_token_metrics", ("labels",), {}),
    ("linear_top1_correct", "softmax_top1_correct", ("labels",), {}),
    ("linear_label_rank", "label_rank", ("labels",), {}),
    ("linear_top_k", "top_k", (), {"k": 5}),
]
# Functions without a gradient.
CONSTANT = ("linear_top1_correct", "linear_label_rank", "linear_top_k")
PAIRS = [
    ("linear_kl_divergence", "softmax_kl_divergence", {}),
    ("linear_jensen_shannon_divergence", "softmax_jensen_shannon_divergence", {}),
    ("linear_soft_target_cross_entropy", "softmax_soft_target_cross_entropy", {}),
    ("linear_knowledge_distillation_loss", "knowledge_distillation_loss", {}),
    ("linear_normalized_distillation_loss", "normalized_distillation_loss", {}),
]
LABELLED_PAIRS = {"linear_normalized_distillation_loss"}


def arrays_of(dtype: Any, vocab_axis: int) -> Arrays:
    given = jax.ShapeDtypeStruct
    weight = (CLASSES, FEATURES) if vocab_axis == 0 else (FEATURES, CLASSES)
    heads = (1024, 8, 64)
    return {
        "hidden": given((ROWS, FEATURES), dtype),
        "weight": given(weight, dtype),
        "other_hidden": given((ROWS, FEATURES), dtype),
        "other_weight": given(weight, dtype),
        "bias": given((CLASSES,), jnp.float32),
        "class_where": given((CLASSES,), jnp.bool_),
        "temperature": given((ROWS,), jnp.float32),
        "labels": given((ROWS,), jnp.int32),
        "several": given((ROWS, 4), jnp.int32),
        "where": given((ROWS,), jnp.bool_),
        "logits": given((ROWS, CLASSES), dtype),
        "query": given((2, *heads), dtype),
        "key": given((2, *heads), dtype),
        "value": given((2, *heads), dtype),
    }


def found(*names: str) -> Callable[..., Any]:
    """The first of these that the library has."""
    for name in names:
        for package in ("losses", "logits", "attention", "recurrent"):
            function = getattr(getattr(softlib, package, None), name, None)
            if function is not None:
                return function
    raise LookupError(f"no function is called any of {names}")


def of_head(
    old: str, new: str, own: tuple[str, ...], options: dict[str, Any], arrays: Arrays
) -> Any:
    hidden, weight = arrays["hidden"], arrays["weight"]
    if "temperature" in own:
        modifiers = dict(arrays["modifiers"])
        modifiers.pop("temperature", None)
        arrays = {**arrays, "modifiers": modifiers}
    named = {name: arrays[name] for name in own if name == "temperature"}
    rest = [arrays[name] for name in own if name not in named]
    where = {} if old in {"linear_row_statistics", "linear_top_k"} else arrays["only"]
    options = {**options, **arrays["modifiers"], **where}
    linear = getattr(softlib.losses, old, None)
    if linear is not None:
        return linear(hidden, weight, *rest, *named.values(), **options)
    head = {n: x for n, x in options.items() if n in OF_HEAD}
    options = {n: x for n, x in options.items() if n not in OF_HEAD}
    logits = softlib.LinearLogits(hidden, weight, **head)  # type: ignore
    return found(new, new.removeprefix("softmax_"))(logits, *rest, **named, **options)


def of_pair(old: str, new: str, options: dict[str, Any], arrays: Arrays) -> Any:
    names = ("hidden", "weight", "other_hidden", "other_weight")
    heads = [arrays[name] for name in names]
    rest = [arrays["labels"]] if old in LABELLED_PAIRS else []
    shared = {n: x for n, x in arrays["modifiers"].items() if n == "vocab_axis"}
    linear = getattr(softlib.losses, old, None)
    if linear is not None:
        twin = {f"target_{n}": x for n, x in shared.items()}
        return linear(*heads, *rest, **options, **shared, **twin)
    logits = [softlib.LinearLogits(*heads[i : i + 2], **shared) for i in (0, 2)]  # type: ignore
    return found(new)(*logits, *rest, **options)


def summed(results: Any) -> jax.Array:
    floats = [
        leaf
        for leaf in jax.tree.leaves(results)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.stack([leaf.astype(jnp.float32).sum() for leaf in floats]).sum()


def _modified(call: Program, vocab_axis: int, names: tuple[str, ...]) -> Program:
    def program(arrays: Arrays) -> Any:
        own: Arrays = {name: arrays[name] for name in names}
        if vocab_axis:
            own["vocab_axis"] = vocab_axis
        if names:
            own |= {"softcap": 30.0, "temperature": arrays["temperature"]}
        only = {"where": arrays["where"]} if names else {}
        return call({**arrays, "modifiers": own, "only": only})

    return program


def programs() -> Iterator[tuple[str, Program, tuple[str, ...], Arrays]]:
    """Name, function of the arrays, those to differentiate in, the arrays."""
    kinds: list[tuple[str, Any, int, tuple[str, ...]]] = [
        ("float32 (V, D)", jnp.float32, 0, ()),
        ("bfloat16 (V, D)", jnp.bfloat16, 0, ()),
        ("bfloat16 (D, V)", jnp.bfloat16, 1, ()),
        ("float32 (V, D) modified", jnp.float32, 0, ("bias", "class_where")),
    ]
    for kind, dtype, axis, modifiers in kinds:
        arrays = arrays_of(dtype, axis)

        for old, new, own, options in HEADS:
            call = functools.partial(of_head, old, new, own, options)
            name = f"{old} {sorted(options)} {kind}"
            yield name, _modified(call, axis, modifiers), ("hidden", "weight"), arrays
        if not modifiers:
            for old, new, options in PAIRS:
                call = functools.partial(of_pair, old, new, options)
                name = f"{old} {sorted(options)} {kind}"
                yield (
                    name,
                    _modified(call, axis, modifiers),
                    ("hidden", "weight"),
                    arrays,
                )
    for dtype in (jnp.float32, jnp.bfloat16):
        arrays = arrays_of(dtype, 0)
        for name, call, inputs in others():
            yield f"{name} {jnp.dtype(dtype).name}", call, inputs, arrays


def others() -> Iterator[tuple[str, Program, tuple[str, ...]]]:
    on_logits = lambda name: lambda a: found(name)(a["logits"], a["labels"])
    for name in ("softmax_cross_entropy", "softmax_focal_loss", "comp_sum_loss"):
        yield name, on_logits(name), ("logits",)
    of_attention = ("query", "key", "value")
    on_heads = lambda name, **options: (
        lambda a: found(name)(*(a[each] for each in of_attention), **options)
    )
    yield (
        "dot_product_attention causal",
        on_heads("dot_product_attention", is_causal=True),
        of_attention,
    )
    yield (
        "dot_product_attention softcap",
        on_heads("dot_product_attention", softcap=20.0),
        of_attention,
    )
    yield "softplus_attention", on_heads("softplus_attention"), of_attention
    yield "linear_attention", on_heads("linear_attention"), of_attention
    yield (
        "decode_attention",
        lambda a: found("decode_attention")(a["query"][:, :1], a["key"], a["value"]),
        (),
    )


def text_of(lowered: Any) -> str:
    text = lowered.as_text()
    # Kernels for GPUs are bytes whose order is not that of their code alone; what they
    # are given, and what they give, stands beside them.
    text = re.sub(r'(kernel_hash|module) = "(?:[^"\\]|\\.)*"', r"\1", text)
    names: dict[str, str] = {}
    named = lambda match: names.setdefault(match[0], f"@f{len(names)}")
    return re.sub(r"@[\w.$\-\"<>]+", named, text)


def main() -> int:
    # Kernels are bytes in the text, with the places in files that made them.
    for folder in ("softlib", "pallas_kernels", "scripts"):
        source_info_util.register_exclusion(str(ROOT / folder))
    jax.config.update("jax_traceback_in_locations_limit", 0)
    # Programs for GPUs are those of a Hopper, which has kernels.
    with mock.patch.object(_devices, "gpu_generation", return_value="hopper"):
        return compare()


def compare() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("before", type=pathlib.Path, nargs="?")
    parser.add_argument("--only", default="", help="a part of the names")
    parser.add_argument("--texts", type=pathlib.Path, help="a folder for the texts")
    options = parser.parse_args()
    hashes: dict[str, str] = {}
    for name, call, inputs, arrays in programs():
        if options.only not in name:
            continue
        for suffix, program in {
            "": call,
            ", gradient": lambda a, call=call, inputs=inputs: jax.grad(
                lambda own: summed(call({**a, **own}))
            )({each: a[each] for each in inputs}),
        }.items():
            if suffix and (not inputs or name.startswith(CONSTANT)):
                continue
            try:
                traced = jax.jit(program).trace(arrays)
            except Exception as error:
                kind = type(error).__name__
                print(f"{name}{suffix}: {kind}: {str(error)[:200]}", file=sys.stderr)
                hashes[f"{name}{suffix}"] = f"raises {kind}"
                continue
            for platform in PLATFORMS:
                key = f"{name}{suffix} {platform}"
                text = text_of(traced.lower(lowering_platforms=(platform,)))
                hashes[key] = hashlib.sha256(text.encode()).hexdigest()[:16]
                if options.texts:
                    options.texts.mkdir(parents=True, exist_ok=True)
                    file = re.sub(r"\W+", "_", key) + ".mlir"
                    (options.texts / file).write_text(text)
    options.output.write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")
    print(f"{len(hashes)} programs")
    if options.before is None:
        return 0
    before = json.loads(options.before.read_text())
    before = {name: text for name, text in before.items() if options.only in name}
    changed = [n for n in sorted(before | hashes) if before.get(n) != hashes.get(n)]
    for name in changed:
        print(f"differs: {name}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
