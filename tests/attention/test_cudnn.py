"""Attention by cuDNN: the calls in lowered programs, and what surrounds them."""

import functools
import re
import types
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

import softlib
from softlib import _ptxas, attention, explain, masks
from softlib.attention._engine import cudnn
from tests.host import jnp
from tests.kernels import attention_problems as problems
from tests.kernels.attention_problems import Problem
from tests.lowered import lowered

B, T, N, K, H = 2, 256, 4, 2, 64
INTEGERS = jax.ShapeDtypeStruct((B,), jnp.int32)


def array(length: int, heads: int, *, B=B, H=H, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct((B, length, heads, H), dtype)


QUERY, KEY = array(T, N), array(T, K)


@pytest.fixture
def has_cudnn():
    """A machine with cuDNN."""
    check = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    with mock.patch(check, return_value=91200):
        yield


def attend(query, key, value, query_lengths=None, key_lengths=None, **options):
    return attention.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        **options,
    )


def training(*arrays: Any, **options: Any) -> Any:
    def loss(*arrays):
        return attend(*arrays, **options).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(*arrays)


def calls(text: str) -> list[tuple[str, ...]]:
    """Of each call of cuDNN: its name, operands, mask, window, and operands' types."""
    found = re.findall(
        r"custom_call @__cudnn\$(\w+)\((.*?)\).*mask_type\\22: \\22(\w+)\\22"
        r".*sliding_window_length\\22: (\d+).* : \((.*)\) ->",
        text,
    )
    assert len(found) == text.count("custom_call @__cudnn")
    return found


def on_cuda(function: Any, *arrays: Any) -> list[tuple[str, ...]]:
    return calls(lowered("cuda", function, *arrays))


def machine(kind: str) -> Any:
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


# ---------------------------------------------------------------------- the calls
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", [None, "cudnn"])
def test_one_call_forward_and_one_backward(dtype, implementation, has_cudnn):
    query, key = array(T, N, dtype=dtype), array(T, K, dtype=dtype)
    step = functools.partial(training, implementation=implementation)
    names = [call[0] for call in on_cuda(step, query, key, key)]
    assert names == ["fmhaSoftmax", "fmhaSoftmaxBackward"]


def test_the_backward_pass_reads_the_results_of_the_forward_pass(has_cudnn):
    rows = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    backward = functools.partial(cudnn.backward_pass, cudnn.Call(1.0, True, None))

    def call(query, key, value, out, lse, cotangent):
        return backward(query, key, value, None, None, out, lse, cotangent)

    (found,) = on_cuda(call, QUERY, KEY, KEY, QUERY, rows, QUERY)
    # cuDNN's order: query, key, value, logsumexp, cotangent, output.
    assert found[1] == "%arg0, %arg1, %arg2, %arg4, %arg5, %arg3"


MASKS: dict[str, tuple[dict[str, Any], str, int]] = {
    "none": ({}, "NO_MASK", 0),
    "causal": ({"is_causal": True}, "CAUSAL", 0),
    "window": ({"is_causal": True, "local_window_size": 30}, "CAUSAL", 31),
    "window to the left": ({"local_window_size": (30, 0)}, "CAUSAL", 31),
    "itself": ({"mask": masks.Window(0, 0)}, "CAUSAL", 1),
    "least window": (
        {"mask": masks.Window(30, 0) & masks.Window(20, 9) & masks.All()},
        "CAUSAL",
        21,
    ),
    "window of all": ({"is_causal": True, "local_window_size": T - 1}, "CAUSAL", 0),
    "causal of all": ({"mask": masks.Causal(T - 1)}, "NO_MASK", 0),
}


@pytest.mark.parametrize("has_lengths", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks_become_those_of_cudnn(name, has_lengths, has_cudnn):
    options, mask, window = MASKS[name]
    arrays = [QUERY, KEY, KEY]
    if has_lengths:
        arrays += [INTEGERS, INTEGERS]
        mask = "PADDING" if mask == "NO_MASK" else f"PADDING_{mask}"
    found = on_cuda(functools.partial(training, **options), *arrays)
    assert [call[2:4] for call in found] == [(mask, str(window))] * 2
    assert [call[4].count("tensor<2xi32>") for call in found] == [2 * has_lengths] * 2


@pytest.mark.parametrize("of", ["query", "key"])
def test_lengths_may_be_those_of_one_side_and_one_for_all(of, has_cudnn):
    def step(length, *arrays):
        return training(*arrays, mask=masks.Padding(**{of: length}))

    length = jax.ShapeDtypeStruct((), jnp.uint8)
    found = on_cuda(step, length, QUERY, KEY, KEY)
    assert [call[2] for call in found] == ["PADDING"] * 2


# ---------------------------------------------------------------------- refusals
REFUSALS: dict[str, dict[str, Any]] = {
    "`query` is float32, not bfloat16 or float16": {"dtype": jnp.float32},
    "`key` is float16, `query` is bfloat16": {"key_dtype": jnp.float16},
    "weights are rounded to the bfloat16": {"precision": "highest"},
    "it takes no bias": {"bias": jnp.zeros((1, 1, T, T))},
    "it takes no boolean array as a mask": {"mask": jnp.ones((1, 1, T, T), bool)},
    "it chooses its own blocks": {"block_key": 64},
    "it has no softcap": {"softcap": 20.0},
    "it takes no sinks": {"sinks": jnp.zeros(N)},
    "it has no weights of kind LogSoftplus": {"normalizer": "softplus"},
    "64 queries are too few": {"T": 64},
    "64 keys are too few": {"S": 64},
    "an axis is empty": {"B": 0},
    "values have 128 features, queries 64": {"E": 128},
    "20 features are not a multiple of 8 up to 128": {"H": 20, "E": 20},
    "136 features are not a multiple of 8 up to 128": {"H": 136, "E": 136},
    "not Causal(-1)": {"mask": masks.Causal(-1)},
    "not Causal().shift(3)": {"is_causal": True, "query_offset": 3},
    "not Causal() | Prefix(9)": {"mask": masks.Causal() | masks.Prefix(9)},
    "not Window(9, 9)": {"local_window_size": 9},
    "not Segments(int32[256]) & Causal()": {
        "mask": masks.Segments(jnp.zeros(T, jnp.int32)),
        "is_causal": True,
    },
    "its windows are causal": {"mask": masks.Window(9, None)},
    "in a window 384 queries are more than 256 keys": {
        "mask": masks.Window(9, 0),
        "T": 384,
    },
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_does_not_cover_is_refused_with_the_reason(reason, has_cudnn):
    options = dict(REFUSALS[reason])
    sizes = {name: options.pop(name, size) for name, size in (("B", B), ("T", T))}
    keys, features = options.pop("S", T), (options.pop("H", H), options.pop("E", H))
    dtype = options.pop("dtype", jnp.bfloat16)
    of_key = options.pop("key_dtype", dtype)
    query = array(sizes["T"], N, B=sizes["B"], H=features[0], dtype=dtype)
    key, value = (array(keys, K, B=sizes["B"], H=n, dtype=of_key) for n in features)
    step = functools.partial(training, **options)
    text = str(explain(step, query, key, value))
    (line, other) = (line for line in text.splitlines() if "not cudnn: " in line)
    assert reason in line
    assert line == other
    with pytest.raises(NotImplementedError, match=f"cudnn: .*{re.escape(reason)}"):
        explain(functools.partial(step, implementation="cudnn"), query, key, value)


def test_without_cudnn_programs_are_as_before():
    with machine("NVIDIA A100-SXM4-40GB"):
        text = str(explain(training, QUERY, KEY, KEY))
        assert "__cudnn" not in lowered("cuda", training, QUERY, KEY, KEY)
    assert text.count("not cudnn: cuDNN is not detected\n") == 2
    pinned = functools.partial(training, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="cudnn: cuDNN is not detected"):
        explain(pinned, QUERY, KEY, KEY)


def test_a_gpu_before_ampere_is_refused(has_cudnn, monkeypatch):
    device = types.SimpleNamespace(
        platform="gpu", device_kind="Tesla T4", compute_capability="7.5"
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    text = str(explain(training, QUERY, KEY, KEY))
    assert "not cudnn: it needs compute capability 8.0, this is 7.5" in text
    device.compute_capability = "8.0"
    assert "cuda: cudnn" in str(explain(training, QUERY, KEY, KEY))


@pytest.mark.parametrize(
    "kind", ["NVIDIA H100 80GB HBM3", "NVIDIA A100", "NVIDIA B200"]
)
def test_it_comes_after_kernels_that_pad_little(kind, has_cudnn):
    def runs(H, **options):
        step = functools.partial(training, **options)
        found = explain(step, *(array(T, N, H=H),) * 3).operations
        assert len(found) == 2
        return {operation.runs["cuda"] for operation in found}

    own = "pallas_gpu" if "H100" in kind else "cudnn"
    with machine(kind):
        assert runs(64) == runs(56) == {own}
        assert runs(80) == runs(80, implementation="cudnn") == {"cudnn"}


def test_a_kernel_that_pads_much_runs_where_it_is_named_or_cudnn_cannot(has_cudnn):
    arrays = (array(T, N, H=80),) * 3
    pinned = functools.partial(training, implementation="pallas_gpu")
    capped = functools.partial(training, softcap=9.0)
    with machine("NVIDIA H100 80GB HBM3"):
        text = str(explain(training, *arrays))
        for step in (pinned, capped):
            assert str(explain(step, *arrays)).count("cuda: pallas_gpu") == 2
    assert text.count("not pallas_gpu: it multiplies 128 features for 80\n") == 2


def test_a_faulty_assembler_does_not_matter(has_cudnn, monkeypatch):
    monkeypatch.setattr(_ptxas, "why_not", lambda: "it is faulty")
    text = str(explain(training, QUERY, KEY, KEY))
    assert "not pallas_gpu: it is faulty" in text
    assert "cuda: cudnn" in text


def test_the_process_wide_switch_knows_it(has_cudnn):
    with softlib.implementations("xla"):
        assert not on_cuda(training, QUERY, KEY, KEY)
    with softlib.implementations("cudnn"):
        assert len(on_cuda(training, QUERY, KEY, KEY)) == 2


# ---------------------------------------------------------------------- around it
def test_a_logsumexp_that_is_returned_takes_the_gradient_of_plain_jax(has_cudnn):
    def loss(*arrays):
        out, lse = attend(*arrays, return_lse=True)
        return out.astype(jnp.float32).sum() + lse.sum()

    step = jax.value_and_grad(loss, (0, 1, 2))
    text = str(explain(step, QUERY, KEY, KEY))
    assert text.count("not cudnn: it has no gradient through the logsumexp") == 1
    assert [call[0] for call in on_cuda(step, QUERY, KEY, KEY)] == ["fmhaSoftmax"]


def test_other_platforms_and_exports_keep_their_own_programs(has_cudnn):
    names = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    unchecked = list(map(export.DisabledSafetyCheck.custom_call, names))
    arrays = array(T, N, H=8), *(array(T, K, H=8),) * 2
    exported = export.export(
        jax.jit(training), platforms=["cpu", "tpu", "cuda"], disabled_checks=unchecked
    )(*arrays)
    assert exported.mlir_module().count("__cudnn") == 2
    for platform in ("cpu", "tpu"):
        assert "__cudnn" not in lowered(platform, training, *arrays)


def test_mapped_axes_join_the_batch(has_cudnn):
    query = jax.ShapeDtypeStruct((B, T, 3, N, H), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((3, B), jnp.int32)
    step = jax.vmap(training, (2, None, None, None, 0))
    found = on_cuda(step, query, KEY, KEY, INTEGERS, lengths)
    assert len(found) == 2
    for *_, operands in found:
        for each in (f"{3 * B}x{T}x{N}x{H}", f"{3 * B}x{T}x{K}x{H}", f"{3 * B}xi32"):
            assert f"tensor<{each}" in operands


@pytest.mark.parametrize("check_vma", [True, False])
def test_each_device_of_a_shard_map_calls_it(check_vma, has_cudnn):
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")

    def step(query, key, value, lengths):
        return training(query, key, value, None, lengths)[1]

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(rows, PartitionSpec(), rows, rows),
        out_specs=(rows, PartitionSpec() if check_vma else rows, rows),
        check_vma=check_vma,
    )
    found = on_cuda(sharded, QUERY, array(T, K, B=1), KEY, INTEGERS)
    assert [call[4].count(f"tensor<1x{T}x{N}x{H}") for call in found] == [1, 3]


def test_a_program_that_forgets_its_results_computes_them_once_more(has_cudnn):
    @jax.checkpoint
    def loss(*arrays):
        return attend(*arrays).astype(jnp.float32).sum()

    step = jax.value_and_grad(loss, (0, 1, 2))
    names = [call[0] for call in on_cuda(step, QUERY, KEY, KEY)]
    assert names == ["fmhaSoftmax", "fmhaSoftmax", "fmhaSoftmaxBackward"]


def test_forward_over_reverse_is_plain_jax(has_cudnn):
    def product(*arrays):
        return jax.jvp(lambda *xs: training(*xs)[1], arrays, arrays)[1]

    assert not on_cuda(product, QUERY, KEY, KEY)


# ---------------------------------------------------------------------- numbers
def _allowed(call, query, key, query_lengths, key_lengths):
    i = jnp.arange(query.shape[1])[None, :, None]
    j = jnp.arange(key.shape[1])[None, None, :]
    ok = j <= i if call.is_causal else (i >= 0) & (j >= 0)
    if call.left is not None:
        ok = ok & (j >= i - call.left)
    ok = jnp.broadcast_to(ok, (query.shape[0], *ok.shape[1:]))
    if query_lengths is not None:
        ok = ok & (i < query_lengths[:, None, None])
        ok = ok & (j < key_lengths[:, None, None])
    return ok[:, None]


def _forward_stand_in(call, query, key, value, *lengths):
    """Stands for cuDNN's forward pass, by `jax.nn`, NaN in rows without keys."""
    ok = _allowed(call, query, key, *lengths)
    out, lse = jax.nn.dot_product_attention(
        *(x.astype(jnp.float32) for x in (query, key, value)),
        mask=ok,
        scale=call.scale,
        implementation="xla",
        return_residual=True,
    )
    some = ok.any(-1)
    out = jnp.where(jnp.moveaxis(some, 1, 2)[..., None], out, jnp.nan)
    lse = jnp.where(some, jnp.moveaxis(lse, 2, 1), jnp.nan)
    return out.astype(query.dtype), lse


def _backward_stand_in(call, query, key, value, *rest):
    """Stands for cuDNN's backward pass; NaN in rows without keys."""
    *lengths, out, lse, cotangent = rest
    ok, wide = _allowed(call, query, key, *lengths), jnp.float32
    groups = query.shape[2] // key.shape[2]
    q, g, o = (jnp.moveaxis(x.astype(wide), 2, 1) for x in (query, cotangent, out))
    k, v = (
        jnp.repeat(jnp.moveaxis(x.astype(wide), 2, 1), groups, 1) for x in (key, value)
    )
    scores = jnp.where(ok, call.scale * q @ k.swapaxes(2, 3), -jnp.inf)
    p = jnp.exp(scores - lse[..., None])
    dz = p * (g @ v.swapaxes(2, 3) - (g * o).sum(-1, keepdims=True)) * call.scale
    dq = jnp.where(ok.any(-1)[..., None], dz @ k, jnp.nan)
    dk, dv = (
        x.reshape(x.shape[0], -1, groups, *x.shape[2:]).sum(2)
        for x in (dz.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ g)
    )
    if lengths[1] is not None:
        real = jnp.arange(key.shape[1])[None] < lengths[1][:, None]
        real = real[:, None, :, None]
        dk, dv = (jnp.where(real, x, jnp.nan) for x in (dk, dv))
    return tuple(jnp.moveaxis(x, 1, 2).astype(query.dtype) for x in (dq, dk, dv))


SHORT = masks.Padding(query=np.array([24, 7], np.int32))
small = functools.partial(Problem, T=24, H=16, E=16)
PROBLEMS = {
    "causal": small(masks.Causal(), S=32, N=4, K=2),
    "window and lengths": small(
        masks.Window(3, 0) & SHORT, S=24, N=2, B=2, lengths=(9, 40), dtype="float16"
    ),
    "no key, extreme scores": small(
        masks.All() & SHORT, S=32, B=2, lengths=(0, 11), spread=300.0
    ),
    "no query": small(masks.Padding(query=np.array([0, 9], np.int32)), S=32, B=2),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_output_and_gradients_around_a_stand_in(name, monkeypatch):
    monkeypatch.setattr(cudnn, "forward_pass", _forward_stand_in)
    monkeypatch.setattr(cudnn, "backward_pass", _backward_stand_in)
    problem = PROBLEMS[name]
    c = 4 * max(problem.spread / 10, 1)
    problems.check(problem, cudnn, c=c, through_lse=False)
