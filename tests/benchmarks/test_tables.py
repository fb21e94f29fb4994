"""The harness at tiny shapes, and what its tables, figure and numbers say."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from benchmarks import __main__ as command, correctness, growth, report, speed
from benchmarks.cases import Case, operands
from benchmarks.measure import Ratio
from benchmarks.products import _in_slices, products
from benchmarks.programs import (
    NAIVE,
    PROGRAMS,
    SOFTLIB,
    SOFTLIB_SUM,
    Program,
    naive,
)
from benchmarks.results import (
    Errors,
    Results,
    Speed,
    SpeedRow,
    from_json,
    to_json,
)
from tests.host import jnp

CASE = Case(8, 4, 96)
GHOST = Program(
    "ghost", lambda case: importlib.import_module("no_such_peer").loss, loss=naive
)


def off_by_a_hundredth(case: Case):
    return lambda *operands: naive(case)(*operands) + 0.01


LIAR = Program(
    "liar",
    lambda case: jax.value_and_grad(off_by_a_hundredth(case), argnums=(0, 1)),
    loss=off_by_a_hundredth,
)
EVERYTHING = (*PROGRAMS, GHOST, LIAR)
OURS = [program for program in PROGRAMS if program.name in (SOFTLIB, SOFTLIB_SUM)]
PACKAGES = {"tokamax": "tokamax", "jax-cce": "jax_cce"}


@pytest.fixture(scope="module")
def results() -> Results:
    quick = {"rounds": 3, "seconds": 0.0, "pause": 0.0}
    speeds = [
        speed.run(case, programs=EVERYTHING, **quick) for case in speed.layouts_of(CASE)
    ]
    return Results(
        {"device": "a test", "cores": "2", "jax": jax.__version__},
        speeds,
        correctness.run(CASE, programs=(PROGRAMS[0], *OURS, GHOST, LIAR)),
        growth.heads({"tiny": CASE}, ("float32",), (PROGRAMS[0], GHOST)),
        growth.run({"V": Case(4, 4, 64)}, steps=2, **quick),
    )


def installed(program: Program) -> bool:
    package = program.name.partition(" ")[0]
    return package not in PACKAGES or bool(importlib.util.find_spec(PACKAGES[package]))


# ------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_every_program_that_is_there_is_timed_or_says_why_not(results, vocab_axis):
    rows = {row.program: row for row in results.speed[vocab_axis].rows}
    here = [p for p in EVERYTHING if vocab_axis in p.layouts]
    assert list(rows) == [p.name for p in here]
    for program in here:
        row = rows[program.name]
        assert bool(row.reason) != bool(row.seconds), row
    for name in (
        NAIVE,
        SOFTLIB,
        SOFTLIB_SUM,
        "bare products, 4 passes",
        f"{SOFTLIB}, loss alone",
    ):
        assert len(rows[name].seconds) == 3
        assert rows[name].ratio is not None
        assert rows[name].temporary_bytes is not None
    assert rows[NAIVE].ratio == Ratio(1.0, 1.0, 1.0, 0.75)
    assert rows["ghost"].reason == "not installed: no_such_peer"


def test_errors_are_small_where_a_program_is_right(results):
    found = {e.program: e for e in results.errors}
    for name in (NAIVE, SOFTLIB, SOFTLIB_SUM):
        assert abs(found[name].loss) < 1e-5
        assert found[name].hidden < 1e-5
        assert found[name].weight < 1e-5
    assert found["liar"].loss == pytest.approx(0.01, rel=1e-3)
    assert [name for name, record in found.items() if record.wrong] == ["liar"]
    assert found["ghost"].reason == "not installed: no_such_peer"


def test_an_error_that_is_nan_is_wrong():
    assert Errors("x", CASE, float("nan"), 0.0, 0.0).wrong
    assert not Errors("x", CASE, reason="not installed: x").wrong


def test_a_program_that_lacks_a_package_is_a_row_without_numbers(results):
    for program in PROGRAMS:
        if not installed(program):
            rows = [row for s in results.speed for row in s.rows]
            mine = [row for row in rows if row.program == program.name]
            assert mine
            assert all(row.reason.startswith("not installed") for row in mine)


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("passes", [3, 4])
@pytest.mark.parametrize("vocabulary", [96, 2048, 2503])
def test_the_bare_products_are_the_products(vocabulary, vocab_axis, passes):
    case = Case(8, 4, vocabulary, vocab_axis)
    hidden, weight, labels = operands(case)
    _, dhidden, dweight = jax.jit(products(case, passes))(hidden, weight, labels)
    table = weight if vocab_axis == 0 else weight.T
    logits = jnp.dot(hidden, table.T)
    np.testing.assert_allclose(dhidden, jnp.dot(logits, table), rtol=1e-4, atol=1e-4)
    gradient = dweight if vocab_axis == 0 else dweight.T
    np.testing.assert_allclose(
        gradient, jnp.dot(logits.T, hidden), rtol=1e-4, atol=1e-4
    )


def test_a_vocabulary_without_divisors_is_cut_into_large_slices():
    sizes = []
    step = lambda start, size, carry: (sizes.append(size), carry)[1]
    _in_slices(step, 0, 50_257)
    assert sizes == [1024, 81]


def test_both_layouts_hold_the_same_numbers():
    hidden, table, labels = operands(CASE)
    again, kernel, same = operands(CASE.with_layout(1))
    np.testing.assert_array_equal(hidden, again)
    np.testing.assert_array_equal(table, kernel.T)
    np.testing.assert_array_equal(labels, same)


def test_a_sweep_doubles_one_size():
    cases = growth.sweep(Case(8192, 256, 32_768), "N")
    assert [case.rows for case in cases] == [512, 1024, 2048, 4096, 8192]
    assert {case.vocabulary for case in cases} == {32_768}


# ------------------------------------------------------------------------------- tables
def test_the_tables_say_who_is_wrong_and_who_is_missing(results):
    text = report.markdown(results, figure="../figure.png")
    rows = [line for line in text.splitlines() if line.startswith("| liar")]
    assert len(rows) == 2
    assert "**wrong**: +0.01 at V = 96" in rows[0]
    assert "**wrong**: +0.01 |" in rows[1]
    assert "| ghost | does not run | - | - | does not run | - | - | - |" in text
    assert "- ghost does not run: not installed: no_such_peer" in text
    assert "#### N = 8, D = 4, V = 96, float32" in text
    assert "](../figure.png)" in text
    assert "figure.png" not in report.markdown(results)


def test_every_row_has_as_many_cells_as_its_header(results):
    tables = report.markdown(results).split("\n\n")
    tables = [part.splitlines() for part in tables if part.startswith("|")]
    assert len(tables) == 4
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1, lines


def test_programs_of_one_layout_have_dashes_in_the_other():
    rows = {name: SpeedRow(name, [1.0] * 3, Ratio(1, 1, 1, 0.75)) for name in "ab"}
    text = report.markdown(
        Results(
            {},
            [
                Speed(CASE, 0.0, [rows["a"]]),
                Speed(CASE.with_layout(1), 0.0, [rows["b"]]),
            ],
            [],
            [],
            [],
        )
    )
    assert "| a | 1000 | 1.00 | - | - | - | - | - |" in text
    assert "| b | - | - | - | 1000 | 1.00 | - | - |" in text


def test_who_is_faster_is_named_unless_wrong_or_within_the_noise():
    row = lambda name, *seconds: SpeedRow(name, list(seconds), Ratio(1, 1, 1, 0.75))
    found = Speed(
        CASE,
        0.0,
        [
            row(SOFTLIB, 1.0, 1.0, 1.0),
            row("quick", 0.5, 0.5, 0.8),
            row("doubtful", 0.5, 0.5, 1.1),
            row("liar", 0.1, 0.1, 0.1),
            row("bare products, 3 passes", 0.1, 0.1, 0.1),
            row("torch", 0.8, 0.8, 1.1),
            SpeedRow("ghost", reason="not installed"),
        ],
    )
    lines = list(report.faster(found, [Errors("liar", CASE, 0.01, 0.0, 0.0)]))
    where = "N = 8, D = 4, V = 96, weight (V, D)"
    assert lines == [
        f"quick, {where}: 2.00 (1.25-2.00)",
        f"torch, {where}: 1.25 (ratio of medians)",
    ]


# ------------------------------------------------------------------------------ on disk
def test_numbers_survive_the_disk(results):
    assert from_json(to_json(results)) == results
    bare = dataclasses.replace(results, speed=[], errors=[], temporaries=[], growth=[])
    assert from_json(to_json(bare)) == bare


def test_render_writes_the_page_and_the_figure(results, tmp_path, capsys):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "results.json").write_text(to_json(results))
    command.main(["--render", "--output", str(tmp_path)])
    page = (folder / "results.md").read_text()
    assert "](../docs/images/benchmarks.png)" in page
    assert "### Errors" in capsys.readouterr().out
    picture = (tmp_path / report.FIGURE).read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_quick_prints_and_writes_nothing(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda options: results)
    command.main(["--quick", "--output", str(tmp_path)])
    assert "| optax on logits |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
