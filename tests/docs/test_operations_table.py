"""The table of what each function runs on each device is what `explain` says."""

import inspect

import pytest

from scripts import operations, operations_table, paper_index

PAGE = operations_table.PAGE.read_text()
TABLE = PAGE.partition(operations_table.BEGIN)[2].partition(operations_table.END)[0]
CALLS = operations.calls()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.key)
def test_a_line_is_current(call):
    message = "run `python -m scripts.operations_table`"
    assert operations_table.line(call) in TABLE.splitlines(), message


def test_there_is_a_line_for_each_call_and_for_nothing_else():
    first = [line.split(" | ")[0].strip("| ") for line in TABLE.splitlines() if line]
    families = {f"**{call.family}**" for call in CALLS}
    found = [name for name in first[2:] if name not in families]
    assert found == [call.name for call in CALLS]
    assert set(first[2:]) >= families
    assert len({call.key for call in CALLS}) == len(CALLS)


def test_all_functions_that_choose_an_implementation_are_in_it():
    choosing = {
        address.rpartition(".")[2]
        for address, value in paper_index.public_values()
        if "implementation" in inspect.signature(value).parameters
    }
    assert len(choosing) > 12
    assert {name for name in choosing if f"`{name}" not in TABLE} == set()


def test_a_gradient_that_runs_something_else_is_behind_a_slash():
    of = {call.name: call for call in CALLS}
    passes = lambda name: operations_table.passes(of[name], "h100").cell
    assert passes("`softmax_cross_entropy_sum`") == "kernel / plain"
    assert passes("`softmax`, float32") == "kernel / plain"
    assert passes("`top1_correct`") == "kernel"
