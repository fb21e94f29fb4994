"""What compilers print, and what is made of it; `make kernels` runs compilers."""

import dataclasses
import itertools

import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.compile_kernels import (
    __main__ as command,
    before,
    report,
    roofline,
    targets,
    traffic,
)
from benchmarks.compile_kernels.case import Case, Division, Most, array
from benchmarks.compile_kernels.cases import all_cases, chosen
from benchmarks.compile_kernels.compiled import (
    Compiled,
    Kernel,
    collectives,
    faults,
    gpu_kernels,
    tpu_kernels,
)
from benchmarks.compile_kernels.launches import Loop, count
from benchmarks.compile_kernels.program import Program
from tests.host import jnp

PROGRAM = """\
ENTRY %main {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %rows.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", \
backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0",\
"size":"4096"},{"memory_space":"1","offset":"4096","size":"1024"}]}
}
"""
BUNDLES = """\
a comment
MXU, XLU, VSTORE:SPILL, VLOAD:FILL
== UTILIZATION:
2 0 1 0
1 1 0 1
"""
GPU_PROGRAM = """\
ENTRY %main {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %mpmd_map.2 = f32[8]{0} custom-call(%p), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/rows/mpmd_map"}, backend_config={kernel_hash = "\\22a\\\\"}
}
"""
PRINTED = """\
Resources(smem_scratch_bytes=2048, tmem=0)
Compiling entry function 'rows_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : (C7519) Potential Performance Loss: x in function 'rows'
ptxas info    : 8 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P0  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4] ;
"""
CASE = Case(
    "rows",
    "small",
    lambda x: x,
    (array(jnp.bfloat16, 8, 128),),
    ("v5e",),
    naive_bytes=1000,
    flops=1e9,
    bytes_moved=1e6,
)
KERNEL = Kernel("rows", 5120, 0, 3, 2)
GOOD = Compiled("rows", "small", "v5e", None, 1, 1, 20, 2e9, 3e6, (KERNEL,))


def test_a_tpu_program():
    (kernel,) = tpu_kernels(PROGRAM, {"rows.1": BUNDLES}.__getitem__)
    assert kernel == Kernel("rows.1", 5120, 1, 3, 2)
    # Without a dump the program still says what it holds.
    (kernel,) = tpu_kernels(PROGRAM, lambda name: "")
    assert (kernel.memory_bytes, kernel.instructions) == (5120, 0)


def test_a_gpu_program():
    known = {}
    (kernel,) = gpu_kernels(GPU_PROGRAM, PRINTED, known)
    note = "(C7519) Potential Performance Loss: x"
    assert kernel == Kernel("rows", 2048, 12, 1, 2, 168, (note,))
    # The second time it is not assembled again.
    assert gpu_kernels(GPU_PROGRAM, "Resources(smem_scratch_bytes=2048)", known) == (
        kernel,
    )
    assert gpu_kernels("ENTRY %main {}", "", known) == ()
    with pytest.raises(ValueError, match="printed nothing of"):
        gpu_kernels(GPU_PROGRAM, "", {})


def test_two_gpu_kernels_of_one_program():
    second = GPU_PROGRAM.splitlines()[2].replace("map.2", "map.10").replace("ROOT ", "")
    program = GPU_PROGRAM + second.replace("rows", "sums").replace("22a", "22b")
    resources, rest = PRINTED.split("\n", 1)
    printed = "\n".join(
        [
            resources,
            resources.replace("2048", "4096"),
            rest.replace("'rows", "'sums").replace("12 bytes spill", "99 bytes spill"),
            rest,
        ]
    )
    found = gpu_kernels(program, printed, {})
    facts = [(kernel.name, kernel.memory_bytes, kernel.spills) for kernel in found]
    assert facts == [("rows", 2048, 12), ("sums", 4096, 99)]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"error": "no"}, "no"),
        ({"kernels": ()}, "0 kernels"),
        ({"temp_bytes": 21}, "21 temporary bytes"),
        ({"kernels": (dataclasses.replace(KERNEL, spills=1),)}, "rows spills 1"),
        (
            {"kernels": (dataclasses.replace(KERNEL, notes=("wgmma serialized",)),)},
            "serialized",
        ),
    ],
)
def test_faults(change, fault):
    assert not list(faults(CASE, GOOD))
    (found,) = faults(CASE, dataclasses.replace(GOOD, **change))
    assert fault in found


def test_what_divided_programs_exchange():
    text = """
  %a.1 = f32[8]{0} all-gather-start(%p), dimensions={0}
  %b.1 = f32[8]{0} all-gather-done(%a.1)
  %c = (f32[], f32[8]{0}) all-reduce(%p, %b.1), to_apply=%sum
"""
    assert collectives(text) == {"all-gather": 1, "all-reduce": 1}
    division = Division("Explicit", (P("device"),), frozenset({"all-reduce"}))
    case = dataclasses.replace(CASE, division=division)
    sums = dataclasses.replace(GOOD, collectives={"all-reduce": 2})
    assert not list(faults(case, sums))
    assert list(faults(CASE, sums)) == ["2 all-reduce between devices"]
    gathers = dataclasses.replace(GOOD, collectives=collectives(text))
    assert list(faults(case, gathers)) == ["1 all-gather between devices"]
    assert "| small: 2 all-reduce | v5e |" in report.markdown([case], [sums])
    assert "| small: no exchange | v5e |" in report.markdown([case], [GOOD])
    assert "2 all-reduce" in report.row(sums)


# A loop in a loop, a loop of unknown length, one of two branches, and work that runs
# beside other work.
LAUNCHES = """\
HloModule jit_f, is_scheduled=true

%c (p: f32[8]) -> pred[] {
  ROOT %more = pred[] custom-call(), custom_call_target="until"
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %dot.1 = f32[8]{0} fusion(%x), kind=kCustom, calls=%uncounted
  ROOT %t = (s32[], f32[8]{0}) tuple(%p, %dot.1)
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %begun = ((f32[8]{0}, s32[]), f32[8]{0}, /*index=2*/u32[]) fusion-start(%p), calls=%g
  %while.1 = (s32[], f32[8]{0}) while(%p), condition=%c, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
  %ended = f32[8]{0} fusion-done(%begun)
  ROOT %t = (s32[], f32[8]{0}) tuple(%p, %ended)
}

%small (p: f32[8]) -> f32[8] {
  ROOT %copy = f32[8]{0} copy(%p)
}

%large (p: f32[8]) -> f32[8] {
  %copy = f32[8]{0} copy(%p)
  ROOT %product = f32[8]{0} custom-call(%copy), custom_call_target="__cublas$gemm"
}

ENTRY %main.9_spmd (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %view = f32[2,4]{1,0} bitcast(%a)
  %while.2 = (s32[], f32[8]{0}) while(%a), condition=%c, body=%outer, \
backend_config={"known_trip_count":{"n":"5"}}
  %while.3 = (s32[], f32[8]{0}) while(%a), condition=%c, body=%inner
  %chosen = f32[8]{0} conditional(%a, %a), branch_computations={%small, %large}
  %called = f32[8]{0} call(%a), to_apply=%small
  ROOT %end = f32[8]{0} add(%chosen, %called)
}
"""


def test_launches_are_counted_with_the_steps_of_loops():
    found = count(LAUNCHES)
    assert found.loops == (Loop(3, 1), Loop(5, 1 + 3, False), Loop(None, 1))
    # Two loops, the larger branch, what is called, and the last addition.
    assert found.total == 5 * (1 + 3) + 1 + 2 + 1 + 1
    with pytest.raises(ValueError, match="holds no program"):
        count("")


# A loop of four steps, which only its condition tells. A step reads a slice of 64 bytes
# of a large array, multiplies it, and writes it into its place of the sums.
TRAFFIC = """\
%sliced (p: f32[4,16], k: s32[]) -> f32[1,16] {
  %p = f32[4,16]{1,0} parameter(0)
  %flat = f32[64]{0} bitcast(%p)
  %k = s32[] parameter(1)
  %part = f32[16]{0} dynamic-slice(%flat, %k), dynamic_slice_sizes={16}
  ROOT %row = f32[1,16]{1,0} multiply(%part, %part)
}

%updated (p: f32[4,16], row: f32[1,16], k: s32[]) -> (f32[4,16], f32[]) {
  %p = f32[4,16]{1,0} parameter(0)
  %row = f32[1,16]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %into = f32[4,16]{1,0} dynamic-update-slice(%p, %row, %k, %k)
  %total = f32[] reduce(%row, %k)
  ROOT %both = (f32[4,16]{1,0}, f32[]) tuple(%into, %total)
}

%compared (k: s32[]) -> pred[] {
  %k = s32[] parameter(0)
  %end = s32[] constant(4)
  ROOT %less = pred[] compare(%k, %end), direction=LT
}

%condition (state: (s32[], f32[4,16])) -> pred[] {
  %state = (s32[], f32[4,16]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%state), index=0
  ROOT %less.1 = pred[] fusion(%k), kind=kLoop, calls=%compared
}

%body (state: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %state = (s32[], f32[4,16]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%state), index=0
  %sums = f32[4,16]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,16]{1,0:T(8,128)S(1)} fusion(%sums, %k), kind=kLoop, calls=%sliced
  %next = (f32[4,16]{1,0}, f32[]{:T(128)S(1)}) fusion(%sums, %row, %k), calls=%updated
  ROOT %t = (s32[], f32[4,16]{1,0}) tuple(%k, %next)
}

ENTRY %main (a: f32[4,16]) -> f32[4,16] {
  %a = f32[4,16]{1,0} parameter(0)
  %near = (f32[4,16]{1,0:S(1)}, f32[4,16]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %there = f32[4,16]{1,0:S(1)} copy-done(%near)
  %loop = (s32[], f32[4,16]{1,0}) while(%a), condition=%condition, body=%body
  %row.1 = f32[1,16]{1,0} slice(%a), slice={[0:1], [0:16]}
  ROOT %end = f32[4,16]{1,0} add(%a, %there)
}
"""


def test_bytes_are_those_of_the_large_memory():
    program = Program.of(TRAFFIC)
    (loop,) = [i for i in program.computations["main"] if i.operation == "while"]
    assert program.steps(loop) == 4
    whole, row, counter = 4 * 16 * 4, 16 * 4, 4
    # The slice is read and stays near; it is written, without the sums around it.
    step = (row + counter) + (row + counter)
    # The copy reads, the slice reads and writes, the sum reads one operand from afar.
    assert traffic.of_program(program) == whole + 4 * step + 2 * row + 2 * whole


def test_a_loop_whose_end_is_data_has_unknown_steps():
    def steps(text):
        program = Program.of(text)
        (loop,) = [i for i in program.computations["main"] if i.operation == "while"]
        return program.steps(loop)

    assert steps(TRAFFIC.replace("direction=LT", "direction=NE")) is None
    assert steps(TRAFFIC.replace("constant(4)", "parameter(1)")) is None


def test_limits_of_a_plain_program():
    case = dataclasses.replace(
        CASE, plain=("v5e",), most=Most(38, 12, 1, 345), naive_bytes=0
    )
    plain = dataclasses.replace(
        GOOD, kernels=(), launches=345, loops=(Loop(37, 9),), moved_bytes=2048
    )
    assert not list(faults(case, plain))
    assert report.from_json(report.to_json([plain])) == [plain]
    told = "345 launches, 37 steps of 9, 2 KiB moved"
    assert told in report.row(plain)
    assert f"| small: {told} |" in report.markdown([case], [plain])
    on_tpu = dataclasses.replace(plain, launches=0, loops=(Loop(37, 0),))
    assert "       37 steps, 2 KiB moved" in report.row(on_tpu)
    changed = lambda **change: list(faults(case, dataclasses.replace(plain, **change)))
    assert changed(loops=(Loop(39, 9),)) == ["39 steps of a loop are more than 38"]
    assert changed(loops=(Loop(None, 9),)) == ["None steps of a loop are more than 38"]
    assert changed(loops=(Loop(1, 13),)) == ["13 launches of a step are more than 12"]
    assert not changed(loops=(Loop(1, 13, is_innermost=False),))
    assert changed(launches=346) == ["346 launches are more than 345"]
    assert changed(temp_bytes=2 << 20) == ["2 MiB of temporaries are more than 1"]


def test_where_plain_jax_is_right_a_kernel_is_a_fault():
    case = dataclasses.replace(CASE, plain=("v5e",))
    assert list(faults(case, GOOD)) == ["1 kernels are in the program"]
    assert not list(faults(case, dataclasses.replace(GOOD, kernels=())))


def test_spills_are_allowed_on_v4_and_where_a_case_says_so():
    spilling = dataclasses.replace(KERNEL, spills=2)
    on = lambda target: dataclasses.replace(GOOD, target=target, kernels=(spilling,))
    assert not list(faults(CASE, on("v4")))
    assert list(faults(CASE, on("v5e")))
    assert not list(faults(dataclasses.replace(CASE, spills=2), on("v5e")))


def test_numbers_survive_json():
    assert report.from_json(report.to_json([GOOD])) == [GOOD]


def test_numbers_of_a_part_replace_those_of_the_same_programs():
    peer = dataclasses.replace(GOOD, name="of a peer that is not installed")
    found = command._among(
        [GOOD, peer], [dataclasses.replace(GOOD, temp_bytes=7)], [CASE]
    )
    assert [(c.name, c.temp_bytes) for c in found] == [("small", 7), (peer.name, 20)]


def test_the_page_has_a_line_for_every_kernel_and_failure():
    text = report.markdown([CASE], [GOOD])
    assert "| small | v5e | 20 B | 2.00% | `rows` | 5 KiB | - | 3 | 2 | 0 |" in text
    failed = dataclasses.replace(GOOD, error="it broke\nbadly")
    assert "| small | v5e | it broke |" in report.markdown([CASE], [failed])
    assert "it broke" in report.row(failed)
    assert "rows: matrix_instructions 3" in report.row(GOOD)


def test_the_roofline_compares_least_and_counted():
    (text,) = roofline.markdown([CASE], [GOOD])
    # 1e9 / 197e12 s against 2e9 / 197e12 s: half of the peak.
    assert "| 1 GFLOP | 1 MB | products | 5.08 µs | 2 GFLOP | 3 MB | 10.2 µs | 50%" in (
        text
    )


def test_names_are_unique_on_each_target():
    for target in targets.TARGETS:
        cases = sorted((c.family, c.name) for c in chosen("", "", target))
        assert cases, target
        assert not [a for a, b in itertools.pairwise(cases) if a == b]
    assert {case.family for case in all_cases()} >= {"row statistics"}


def test_targets_have_devices():
    assert set(roofline.DEVICES) == set(targets.TARGETS)
    assert targets.is_tpu("v5e")
    assert not targets.is_tpu("h100")


# ------------------------------------------------------------------------------- before
def test_training_steps_stand_beside_what_they_were():
    one, *others = before.cases()
    target = one.targets[0]
    made = lambda **values: Compiled(one.family, one.name, target, **values)
    loops = (Loop(148, 9), Loop(32, 7))
    old = made(temp_bytes=3 << 20, launches=82_214, loops=loops, moved_bytes=4 << 30)
    new = made(temp_bytes=5 << 20, launches=686, moved_bytes=1 << 30)
    lines = before.markdown([old], [new]).splitlines()
    head = f"| {one.name} | {target} | 82,214 | 148 x 9, 32 x 7 | 3 MiB | 4 GiB"
    assert f"{head} | 686 | - | 5 MiB | 1 GiB |" in lines
    failed = made(error="out of memory\nand more")
    assert f"{head} | - | out of memory | - | - |" in "\n".join(
        before.markdown([old], [failed]).splitlines()
    )
    count = sum(len(case.targets) for case in (one, *others))
    assert sum(line.startswith("| ") for line in lines) == count + 2
    assert before.markdown([], []).count("| ? |") == 4 * count


def test_they_are_compiled_for_every_machine_with_and_without_launches():
    assert len(before.cases()) == 6
    for case in before.cases():
        assert set(case.targets) == {"a100", "h100", "b200", "v5e", "v6e", "tpu7x"}
    assert len(before.cases("v5p")) == 0


def test_the_table_beside_what_was_is_current():
    now = report.from_json(before.NOW.read_text())
    assert before.TABLE.read_text() == before.markdown(before.numbers(), now)
