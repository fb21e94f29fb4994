"""Training steps for many devices: what is read from programs, and whether it is so."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest

from benchmarks.compile_kernels.program import Program, Shape
from benchmarks.scale import (
    __main__ as command,
    advice,
    collectives,
    divisions,
    flops,
    links,
    outcome,
    page,
    report,
)
from benchmarks.scale.collectives import Collective
from benchmarks.scale.divisions import AXES, DIVISIONS
from benchmarks.scale.model import Model
from tests.host import jnp

TINY = command.TINY
CHECKED_IN = outcome.from_json(outcome.NUMBERS.read_text())
MODEL = CHECKED_IN.model
SIZES = {name: math.prod(shape) for name, shape in MODEL.shapes.items()}
VECTORS = sum(size for name, size in SIZES.items() if "norm" in name)
MATRICES = sum(SIZES.values()) - VECTORS
OF_LAYERS = MATRICES - SIZES["embedding"]
COUNTS = sorted({each.case.devices for each in CHECKED_IN.outcomes})
TEXT = """\
HloModule jit_step, is_scheduled=true

%c (p: f32[8]) -> pred[] {
  ROOT %more = pred[] custom-call(), custom_call_target="until"
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %s = f32[] add(%a, %a)
}

%product (l: bf16[8,16], r: bf16[4,16]) -> f32[8,4] {
  %l = bf16[8,16]{1,0} parameter(0)
  %r = bf16[4,16]{1,0} parameter(1)
  ROOT %d = f32[8,4]{1,0} dot(%l, %r), lhs_contracting_dims={1}, \
rhs_contracting_dims={1}
}

%idle (p: (bf16[8,16])) -> f32[8,4] {
  ROOT %zero = f32[8,4]{1,0} constant(0)
}

%busy (p: (bf16[8,16])) -> f32[8,4] {
  %p.2 = (bf16[8,16]{1,0}) parameter(0)
  %h = bf16[8,16]{1,0} get-tuple-element(%p.2), index=0
  %w = bf16[4,16]{1,0} constant(0)
  ROOT %f = f32[8,4]{1,0} fusion(%h, %w), kind=kOutput, calls=%product
}

%layer (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.1 = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%p.1), index=1
  %g = ((bf16[8,16]{1,0}, bf16[2,16]{1,0}), (bf16[32,16]{1,0}, /*index=1*/bf16[8,16])) \
all-gather-start(%x, %small), replica_groups=GROUPS, dimensions={0}
  %small = bf16[2,16]{1,0} slice(%x), slice={[0:2], [0:16]}
  %gd = (bf16[32,16]{1,0}, bf16[8,16]) all-gather-done(%g)
  %c = f32[8,4]{1,0} conditional(%i, %t, %t), branch_computations={%idle, %busy}
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%p.1, %x)
}

ENTRY %main.7_spmd (p: bf16[8,16]) -> f32[8] {
  %p = bf16[8,16]{1,0} parameter(0)
  %while.1 = (s32[],
    bf16[8,16]{1,0}) while(%p), condition=%c, body=%layer, \
backend_config={"known_trip_count":{"n":"3"}}
  %while.2 = (s32[]) while(%p), condition=%c, body=%idle
  %u = f32[64]{0} constant(0)
  %r = f32[64]{0} all-reduce(%u), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %m = f32[64]{0} collective-permute(%u), source_target_pairs={{0,1},{3,4}}
  %k = (bf16[8,4]{1,0}, s8[64]{0}) custom-call(%p, %w), \
custom_call_target="__cublas$lt$matmul", \
backend_config={"lhs_contracting_dimensions":["1"]}
  ROOT %a2a = (f32[8]{0}, f32[8]{0}) all-to-all(%v, %v), replica_groups={}
  %v = f32[8]{0} slice(%u), slice={[0:8]}
}
"""
# Groups of four devices that are two apart, in each notation.
GROUPS = (
    "mesh['a'=4,'b'=2] {'a'}",
    "[2,4]<=[4,2]T(1,0)",
    "{{0,2,4,6},{1,3,5,7}}",
)


# ------------------------------------------------------------------------ reading text
@pytest.mark.parametrize("groups", GROUPS)
def test_exchanges_of_a_program_count_with_the_steps_of_loops(groups):
    program = Program.of(TEXT.replace("GROUPS", groups))
    found = {each.kind: each for each in collectives.of_program(program, 8, 4)}
    gathered = 4 * (8 * 16 + 2 * 16) * 2  # four devices, both operands, bfloat16
    assert found == {
        "all-gather": Collective("all-gather", 4, 2, 3, 3 * gathered),
        "all-reduce": Collective("all-reduce", 8, 4, 1, 64 * 4),
        # One of the pairs crosses hosts.
        "collective-permute": Collective("collective-permute", 2, 1, 1, 64 * 4),
        "all-to-all": Collective("all-to-all", 8, 4, 1, 2 * 8 * 4),
    }
    assert collectives.total(found.values(), "all-gather") == 3 * gathered


def test_groups_in_another_notation_and_texts_without_a_program_are_errors():
    program = Program.of(TEXT.replace("GROUPS", "mesh['a'=4,'b'=4] {'a'}"))
    with pytest.raises(ValueError, match="unknown groups of devices: replica_groups"):
        collectives.of_program(program, 8, 4)
    with pytest.raises(ValueError, match="holds no program"):
        Program.of("")


def test_products_count_with_loops_the_larger_branch_and_calls_of_libraries():
    program = Program.of(TEXT.replace("GROUPS", GROUPS[0]))
    assert flops.of_program(program) == 3 * (2 * 8 * 4 * 16) + 2 * 8 * 4 * 16
    assert program.unknown_loops == 1
    assert program.kernels == 0


def kernel(name: str, operands: list[Shape], result: Shape) -> str:
    lines = [
        f"  %o{i} = {o.dtype}[{','.join(map(str, o.sizes))}] parameter({i})"
        for i, o in enumerate(operands)
    ]
    names = ", ".join(f"%o{i}" for i in range(len(operands)))
    sizes = ",".join(map(str, result.sizes))
    call = (
        f"  ROOT %k = {result.dtype}[{sizes}] custom-call({names}), "
        'custom_call_target="mosaic_gpu_v2", '
        f'metadata={{op_name="jit(f)/{name}/mpmd_map"}}'
    )
    return "\n".join(["ENTRY %main () -> f32[] {", *lines, call, "}"])


def test_flops_of_kernels_are_those_of_their_tiles():
    heads = [Shape("bf16", (2, 512, 4, 128)), *[Shape("bf16", (2, 512, 1, 128))] * 2]
    lists = [Shape("s32", (10,)), Shape("s32", (4, 4))]
    rows = [Shape("f32", (2, 4, 512))] * 2
    of_tile = lambda keys: 2 * 4 * 10 * 128 * keys * 2 * 128  # of one product
    for name, operands, expected in (
        ("block_sparse_attention", [*heads, *lists], 2 * of_tile(128)),
        (
            "attention_query_gradient",
            [*heads, heads[0], *rows, *lists],
            3 * of_tile(64),
        ),
        ("attention_key_gradients", [*heads, heads[0], *rows, *lists], 4 * of_tile(64)),
        (
            "row_statistics_forward",
            [Shape("bf16", (64, 32)), Shape("bf16", (1000, 32))],
            2 * 64 * 32 * 1000,
        ),
    ):
        text = kernel(name, operands, Shape("f32", (64, 32)))
        program = Program.of(text)
        assert flops.of_program(program) == expected, name
        assert program.kernels == 1
    with pytest.raises(ValueError, match="operations does the kernel 'mine' have"):
        flops.of_program(Program.of(kernel("mine", heads, Shape("f32", (1,)))))


def test_what_is_sent_and_what_leaves_a_host():
    parts = {"all-gather": 64, "reduce-scatter": 64, "all-reduce": 128}
    for kind, within in parts.items():
        one = Collective(kind, 8, 8, 1, 8 * 64)
        assert (one.sent, one.sent_between_hosts) == (7 * within, 0)
        # Four hosts of two: the ring enters a host once, over the ports of both.
        several = dataclasses.replace(one, near=2)
        assert several.sent_between_hosts == 7 * within / 2
    moved = Collective("all-to-all", 8, 2, 1, 800)
    assert (moved.sent, moved.sent_between_hosts) == (700, 600)
    pair = Collective("collective-permute", 2, 1, 1, 800)
    assert (pair.sent, pair.sent_between_hosts) == (800, 800)
    machine = links.Machine("m", 1.0, 1, "fast", 100.0, "slow", 50.0)
    assert machine.near_seconds([moved, pair]) == 15
    assert machine.seconds([moved, pair]) == 28
    assert dataclasses.replace(machine, far=None).seconds([moved, pair]) == 15


# ------------------------------------------------------------------------ the programs
def test_the_command_writes_what_a_process_of_many_devices_compiled(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "NUMBERS", tmp_path / "scale.json")
    machine = ("--target", "cpu", "--devices", "8", "--host", "4")
    which = ("--tiny", "--divisions", "data parallel", "--heads", "softlib")
    files = ("--write", "--texts", str(tmp_path))
    assert command.main([*machine, *which, *files]) == 0
    (found,) = outcome.from_json((tmp_path / "scale.json").read_text()).outcomes
    sizes = {name: math.prod(shape) for name, shape in TINY.shapes.items()}
    # The gradient of every parameter, and the loss. A CPU adds bfloat16 in float32.
    (sums,) = found.collectives
    assert (sums.kind, sums.members, sums.near) == ("all-reduce", 8, 4)
    assert sums.bytes == 4 * sum(sizes.values()) + 4
    assert found.argument_bytes >= 3 * 4 * sum(sizes.values())
    assert found.tokens == TINY.length
    assert found.flops > 6 * TINY.length * sum(sizes.values())
    assert (tmp_path / f"{found.case.name}.txt").read_text().startswith("HloModule")
    assert "all-reduce among 8 (4 of a host)" in capsys.readouterr().out


def test_a_program_that_fails_is_a_line():
    case = outcome.Case("no such division", "softlib", 8, 4, "cpu")
    found = command._outcome(case, TINY, None)
    assert found.error is not None
    assert "StopIteration" in found.error
    assert found.error in report.lines(found)


def trained(division: divisions.Division, head: str) -> Any:
    """Loss and parameters after a step of a small model on eight devices."""
    model = dataclasses.replace(TINY, layers=1, vocabulary=64, length=32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), AXES)
    rng = np.random.default_rng(0)
    parameters: Any = {
        name: np.float32(rng.normal(size=shape) / shape[-1] ** 0.5)
        for name, shape in model.shapes.items()
    }
    # The same two sequences for every division.
    again = division.sequences(mesh) // 2
    tokens, labels = (
        np.tile(rng.integers(0, model.vocabulary, (2, model.length)), (again, 1))
        for _ in range(2)
    )
    program = divisions.lower(model, division, head, mesh).compile()
    state = optax.adam(1e-4).init(jax.tree.map(jnp.asarray, parameters))
    given = (parameters, state, tokens.astype(np.int32), labels.astype(np.int32))
    placed = jax.tree.map(
        lambda x, s: jax.device_put(np.asarray(x), s), given, program.input_shardings[0]
    )
    _, (moments, _), loss = program(*placed)
    return jax.device_get((loss, moments.mu))


def check_step(division: divisions.Division, head: str) -> None:
    (loss, means), (one, expected) = trained(division, head), reference()
    np.testing.assert_allclose(loss, one, rtol=2e-3)
    for name, gradient in expected.items():
        error = np.abs(means[name] - gradient).max() / np.abs(gradient).max()
        assert error < 0.05, (name, error)  # everything is bfloat16


def test_a_divided_vocabulary_takes_the_step_of_whole_parameters():
    check_step(next(d for d in DIVISIONS if d.vocabulary), "softlib")


@pytest.mark.slow
@pytest.mark.parametrize("head", divisions.HEADS)
@pytest.mark.parametrize("division", DIVISIONS, ids=lambda division: division.name)
def test_every_division_takes_the_same_step(division, head):
    check_step(division, head)


@functools.cache
def reference() -> Any:
    return trained(DIVISIONS[0], "stored")


# ----------------------------------------------------------------- numbers checked in
def test_the_page_is_that_of_the_numbers():
    assert page.markdown(CHECKED_IN) == outcome.NUMBERS.with_suffix(".md").read_text()
    cases = [each.case for each in CHECKED_IN.outcomes]
    assert len(cases) == len(COUNTS) * len(DIVISIONS) * len(divisions.HEADS)
    assert Model() == MODEL
    for each in CHECKED_IN.outcomes:
        assert each.error is None
        assert not each.unknown_loops
        assert each.case.target == "h100"


@pytest.mark.parametrize("devices", COUNTS)
def test_the_exchanges_of_the_page_derived_by_hand(devices):
    def found(division: str, kind: str) -> int:
        of = CHECKED_IN.find(division, "softlib", devices)
        assert of is not None
        return collectives.total(of.collectives, kind)

    # Gradients of matrices in bfloat16, of vectors in float32, and the loss.
    sums = 2 * MATRICES + 4 * VECTORS + 4
    assert found("data parallel", "all-reduce") == sums
    # Layers are gathered forward and backward; the head, and the ids of all tokens.
    ids = 4 * devices * MODEL.length
    gathered = 2 * (2 * OF_LAYERS + SIZES["embedding"]) + ids
    assert found("fully sharded", "all-gather") == gathered
    assert found("fully sharded", "reduce-scatter") == 2 * MATRICES
    # Embedded tokens, and their gradient.
    tokens = 2 * 2 * MODEL.length * MODEL.features
    assert found("fully sharded", "all-to-all") == tokens
    # Queries, keys, values and outputs: forward, again, and gradients.
    part, layers = MODEL.length // 8, MODEL.layers
    queries, keys = (2 * n * MODEL.head_size for n in (MODEL.heads, MODEL.key_heads))
    moved = layers * 3 * 2 * part * (queries + keys)
    assert found("sequence, all to all", "all-to-all") == tokens // 8 + moved
    # Keys and values to seven devices twice, and float32 gradients back.
    moved = layers * 7 * part * 2 * keys * (1 + 1 + 2)
    assert found("sequence, ring", "collective-permute") == moved


def test_advice_is_left_out_where_outcomes_are_missing():
    nothing = dataclasses.replace(CHECKED_IN, outcomes=())
    assert list(advice.sentences(nothing)) == []
    some = [x for x in CHECKED_IN.outcomes if x.case.division == "fully sharded"]
    text = list(advice.sentences(dataclasses.replace(CHECKED_IN, outcomes=tuple(some))))
    assert [each.split("**")[1] for each in text] == ["Fully sharded", "Stored logits"]


def test_new_outcomes_take_the_place_of_those_of_the_same_case():
    first, second = CHECKED_IN.outcomes[:2]
    changed = dataclasses.replace(second, flops=1)
    assert command._among([second, first], [changed]) == (first, changed)
