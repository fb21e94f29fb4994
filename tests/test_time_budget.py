import pathlib

from tests import time_budget


def test_seconds_belong_to_the_folder_below_tests():
    spent = time_budget.seconds_by_package(
        [
            ("tests/losses/test_a.py::test_x[1/2]", 1.0),
            ("tests/losses/deep/test_b.py::test_y", 2.0),
            ("tests/test_imports.py::test_z", 4.0),
        ]
    )
    assert spent == {"losses": 3.0, time_budget.REPOSITORY: 4.0}


def test_a_package_over_its_budget_is_named():
    spent = {"losses": 3.0, "nn": 1.0, "masks": 2.0}
    assert time_budget.lines(spent, {"losses": 2.0, "nn": 5.0}) == [
        "losses      3.0 s of 2 s: OVER BUDGET",
        "masks       2.0 s without a budget: add it to tests/time_budget.toml",
        "nn          1.0 s of 5 s",
        "total       6.0 s of 7 s",
    ]


def test_the_budgets_fit_into_fifteen_minutes_on_two_processes(
    repository: pathlib.Path,
):
    table = (repository / "tests/time_budget.toml").read_text()
    assert sum(time_budget.parse(table).values()) < 2 * 15 * 60


def test_the_suite_reports_the_time_of_each_package(pytester):
    here = pathlib.Path(__file__).parent
    pytester.mkdir("tests")
    table = "time_budget.toml"
    for name in (
        "__init__.py",
        "conftest.py",
        "long_tests.py",
        "pairwise.py",
        "selection.py",
        "selection_hooks.py",
        "time_budget.py",
        "type_checks.py",
        "long_tests.txt",
        table,
    ):
        pytester.path.joinpath("tests", name).write_text((here / name).read_text())
    folder = pytester.mkdir("tests/losses")
    folder.joinpath("test_x.py").write_text(
        "import time\ndef test_x(): time.sleep(0.3)\n"
    )
    arguments = ("-p", "xdist", "-n", "2", "-o", "pythonpath=.", "tests")
    result = pytester.runpytest_subprocess(*arguments, timeout=120)
    result.assert_outcomes(passed=1)
    result.stdout.re_match_lines(
        [r"=+ test time by package =+", r"losses\s+0\.[3-9] s of"]
    )
