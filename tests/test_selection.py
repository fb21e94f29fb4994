"""A run of the suite tries some of every kind, and the runs together try everything."""

import itertools
import pathlib
import subprocess
import textwrap

import pytest

from tests import long_tests, selection
from tests.pairwise import name, pairwise
from tests.selection import Case

AXES = {"implementation": (0, 1), "dtype": (0, 1, 2), "layout": range(6)}
# In which every stride meets some axis again and again.
PRODUCT = [
    Case(
        f"f.py::product[{'-'.join(map(str, values))}]",
        tuple(zip(AXES, values, strict=True)),
    )
    for values in itertools.product(*AXES.values())
]
PAIRS = [
    Case(f"f.py::pairs[{name(case)}]", (("case", i),))
    for i, case in enumerate(pairwise(AXES))
]
ALONE = [Case("f.py::alone"), Case("g.py::alone")]
CASES = [*PRODUCT, *PAIRS, *ALONE]
TURNS = 2
LONG = [
    selection.case(f"f.py::long{i}[{j}]", {"j": j}, TURNS)
    for i in range(40)
    for j in range(3)
]
OFFSETS = range(20)


def of_test(cases: list[Case], test: str) -> list[Case]:
    return [case for case in cases if case.test.endswith(f"::{test}")]


@pytest.mark.parametrize("every", [1, 2, 3, 6, 12, 1000])
@pytest.mark.parametrize("offset", OFFSETS)
def test_each_value_of_each_axis_is_taken(every, offset):
    chosen = of_test(selection.select(CASES, every, offset), "product")
    for place, values in enumerate(AXES.values()):
        assert {case.values[place][1] for case in chosen} == {*values}


@pytest.mark.parametrize("offset", OFFSETS)
def test_pairwise_lists_and_tests_without_parameters_run_whole(offset):
    chosen = selection.select(CASES, 1000, offset)
    assert of_test(chosen, "pairs") == PAIRS
    assert of_test(chosen, "alone") == ALONE


@pytest.mark.parametrize("every", [2, 3, 6, 12])
def test_offsets_in_a_row_take_everything(every):
    for start in OFFSETS:
        offsets = range(start, start + every)
        taken = {c for k in offsets for c in selection.select(CASES, every, k)}
        assert taken == {*CASES}


def test_what_is_taken_is_a_part():
    """A selection of everything would keep all the promises above."""
    many = [
        Case(f"f.py::t[{i}-{j}]", (("i", i), ("j", j)))
        for i in range(40)
        for j in range(40)
    ]
    chosen = selection.select(many, 8, 3)
    assert 1600 / 8 / 1.5 < len(chosen) < 1600 / 8 * 1.5
    assert chosen == sorted(chosen, key=many.index)
    assert len(of_test(selection.select(PRODUCT, 1000, 0), "product")) == 6


def test_the_order_of_cases_and_of_parameters_changes_nothing():
    chosen = selection.select(CASES, 6, 5)
    assert {*selection.select(CASES[::-1], 6, 5)} == {*chosen}


def test_tests_of_a_file_are_taken_in_turn_and_never_none():
    cases = [Case(f"f.py::t{i}[{j}]", (("j", j),)) for i in range(9) for j in range(2)]
    cases += ALONE
    taken = set()
    for offset in range(4):
        chosen = selection.select(cases, 1, offset, one_in=4)
        assert {case.file for case in chosen} == {"f.py", "g.py"}
        assert len(chosen) < len(cases)
        taken |= {*chosen}
    assert taken == {*cases}


def test_slices_in_a_row_take_everything_once():
    slices = [selection.slice_of(CASES, 5, offset) for offset in range(7, 12)]
    taken = list(itertools.chain(*slices))
    assert sorted(taken, key=CASES.index) == CASES
    # The order of a slice favours no file.
    assert selection.slice_of(CASES, 1, 0) != selection.slice_of(CASES, 1, 1)


def test_equal_parameters_are_one_value_and_others_are_not():
    case = {"a": [1]}
    found = [
        selection.case("t", {"x": x, "y": case})
        for x in (1, 1.0, True, "1", (1,), float("1"))
    ]
    assert len({*found}) == 5
    assert selection.case("t", {"x": {}}) != selection.case("t", {"x": {"a": 1}})


def test_a_long_test_with_a_pairwise_list_runs_that_whole_every_time():
    pairs = [
        selection.case(f"f.py::t[{i}]", {"pair": pair, "implementation": "xla"}, TURNS)
        for i, pair in enumerate(pairwise(AXES))
    ]
    assert all(dict(case.values).keys() == {"pair"} for case in pairs)
    for offset in OFFSETS:
        assert selection.select(pairs, 1000, offset) == pairs


def test_long_tests_run_in_turns_of_which_none_is_left_out():
    chosen = {k: selection.select(LONG, 3, k) for k in OFFSETS}
    tests = {k: {case.test for case in chosen[k]} for k in OFFSETS}
    for k in OFFSETS[: -3 * TURNS]:
        turns = [tests[k + i] for i in range(TURNS)]
        assert sum(map(len, turns)) == len(set().union(*turns)) == 40
        rounds = [chosen[k + i] for i in range(3 * TURNS)]
        assert {*itertools.chain(*rounds)} == {*LONG}
    assert selection.select(LONG, 1, 0) == LONG
    # Not all in the same turn.
    assert all(10 < len(tests[k]) < 30 for k in OFFSETS)


def test_what_shares_a_file_takes_turns_together():
    cases = [
        selection.case(f"e/{i % 9}.py::t{i}", {}, 3, f"e/{i % 9}.py") for i in range(99)
    ]
    for offset in OFFSETS:
        chosen = selection.select(cases, 2, offset)
        files = {case.file for case in chosen}
        assert chosen == [case for case in cases if case.file in files]
        assert 0 < len(files) < 9


# ------------------------------------------------------------- the table of long tests
MANY = "\n".join(
    f'<testcase classname="tests.losses.test_a" name="test_many[{i}]" time="0.1" />'
    for i in range(101)
)
JUNIT = f"""<testsuites><testsuite>
    <testcase classname="tests.losses.test_a" name="test_quick" time="0.3" />
    <testcase classname="tests.losses.test_a" name="test_long" time="2.0" />
    <testcase classname="tests.losses.test_a" name="test_cases[1]" time="0.2" />
    <testcase classname="tests.losses.test_a" name="test_cases[2]" time="0.6" />
    {MANY}
    <testcase classname="tests.masks.test_a" name="test_quick" time="1.9" />
    <testcase classname="tests.masks.test_a" name="test_long" time="2.1" />
    <testcase classname="tests.masks.test_a" name="test_cases[1]" time="1.8" />
    <testcase classname="tests.masks.test_a" name="test_cases[2]" time="2.4" />
    <testcase classname="tests.kernels.test_b" name="test_cases[2]" time="9.0" />
    <testcase classname="tests.kernels.test_b" name="test_long" time="9.0" />
    <testcase classname="tests.examples.test_c" name="test_run" time="7.0" />
    <testcase classname="tests.examples.test_c" name="test_picture" time="0.1" />
</testsuite></testsuites>"""


def test_what_a_run_measured_is_the_table():
    text = long_tests.table(long_tests.measured(JUNIT))
    assert text == (
        "7.1 tests/examples/test_c.py\n"
        "9.0 tests/kernels/test_b.py::test_long\n"
        "0.4 tests/losses/test_a.py::test_cases\n"
        "2.0 tests/losses/test_a.py::test_long\n"
        "0.1 tests/losses/test_a.py::test_many\n"
        "2.1 tests/masks/test_a.py::test_cases\n"
        "2.1 tests/masks/test_a.py::test_long\n"
    )
    assert long_tests.read(text)["tests/losses/test_a.py::test_cases"] == 0.4


def test_the_table_is_by_test_or_by_file():
    assert long_tests.entry("tests/a/test_x.py::t[1]") == "tests/a/test_x.py::t"
    assert long_tests.entry("tests/examples/test_x.py::t") == "tests/examples/test_x.py"


def test_what_takes_longer_waits_for_more_turns():
    turns = lambda test: [long_tests.turns(test, s) for s in (0.3, 0.6, 0.7, 4, 100)]
    assert turns("tests/losses/test_a.py::test_long") == [1, 2, 3, 8, 8]
    assert turns("tests/masks/test_a.py::test_long") == [1, 1, 1, 2, 8]
    assert turns("tests/losses/test_a.py::test_matches_oracle") == [1] * 5


def test_long_tests_exist():
    names = list(long_tests.read(long_tests.TABLE.read_text()))
    assert names == sorted({*names})
    assert [name for name in names if not long_tests.exists(name)] == []


def test_the_offset_is_the_number_of_commits(tmp_path: pathlib.Path):
    assert selection.commits(tmp_path) == 0
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (
        ["init", "-q"],
        *[["commit", "-q", "--allow-empty", "-m", "x"]] * 3,
    ):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    assert selection.commits(tmp_path) == 3


def test_without_git_the_offset_is_zero(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert selection.commits(tmp_path) == 0


# ------------------------------------------------------------------------- under pytest
EXAMPLE = """
    import pytest

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("implementation", ["xla", "reference"])
    @pytest.mark.parametrize("layout", [
        *(pytest.param(i, marks=pytest.mark.slow) for i in range(6)), *range(6, 9),
    ])
    def test_product(layout, implementation, dtype):
        pass

    # The first case, which a count of all cases would take, is slow.
    @pytest.mark.parametrize("kind", [pytest.param(0, marks=pytest.mark.slow), 1])
    def test_with_a_slow_start(kind):
        pass
"""


CONFTEST = """
    from tests.selection_hooks import (
        pytest_addoption,
        pytest_collection_modifyitems,
        pytest_configure,
        pytest_report_header,
        pytest_runtest_setup,
    )
"""


@pytest.fixture
def run(pytester: pytest.Pytester, repository: pathlib.Path):
    """Runs pytest on the example; returns the cases that ran, and the output."""
    pytester.makeconftest(CONFTEST)
    pytester.mkdir("tests")
    folder = pytester.mkdir("tests/example")
    folder.joinpath("test_x.py").write_text(textwrap.dedent(EXAMPLE))
    pytester.makeini(f"[pytest]\nmarkers = slow: x\npythonpath = {repository}\n")

    def call(*arguments: str) -> tuple[set[str], str]:
        result = pytester.runpytest("-p", "no:cacheprovider", "-v", *arguments)
        lines = [line for line in result.outlines if "PASSED" in line]
        words = {word for line in lines for word in line.split() if "::" in word}
        return {word.partition("::")[2] for word in words}, result.stdout.str()

    return call


def test_a_run_takes_of_what_marks_leave(run):
    ran, output = run("-m", "not slow", "--every", "6")
    assert "one case in 6" in output
    assert "offset 0" in output  # no repository here
    assert "test_with_a_slow_start[1]" in ran
    for value in ("float32", "bfloat16", "xla", "reference", "[6-", "[7-", "[8-"):
        assert any(value in name for name in ran), value
    assert not any("[0-" in name for name in ran)
    assert len(ran) < 13


def test_processes_take_what_one_takes(run):
    options = ("-m", "not slow", "--every", "6", "--offset", "4")
    alone, output = run(*options)
    assert "offset 4" in output
    assert run(*options, "-n", "2")[0] == alone
    other, _ = run("-m", "not slow", "--every", "6", "--offset", "5")
    assert other != alone


def test_slices_are_of_what_a_run_leaves_and_of_slow_cases(run):
    everything, _ = run()
    taken = set()
    for offset in range(3):
        chosen, _ = run("-m", "not slow", "--every", "6", "--offset", str(offset))
        rest, output = run("--every", "6", "--slice", "3", "--offset", str(offset))
        assert "one in 3 of the cases" in output
        assert not chosen & rest
        taken |= chosen | rest
    assert taken == everything


def test_what_starts_too_late_is_skipped(run):
    ran, output = run("--seconds", "0")
    assert not ran
    assert "38 skipped" in output
