"""`make mutants` breaks expressions that compute, and says what tests say of it."""

import ast
import pathlib
import textwrap

import pytest

from scripts import mutants
from scripts.mutations import mutants_of

SOURCE = '''
"""Text 1."""
import jax.numpy as jnp

LIMIT: "Float[Array, 'a 3']" = 2.5

@decorated(7)
def f(x: int = 3, *, flag=True) -> "8":
    """Text 9."""
    assert x > 0, 11
    if x < 2 and flag:
        raise ValueError(f"must be {x + 13}.")
    y = jnp.where(x > 0, x * 4, -x)
    return jnp.max(y, axis=1) / jnp.exp(é + 5)
'''


def changes_of(expression: str) -> set[str]:
    return {mutant.new[1:-1] for mutant in mutants_of("f.py", expression)}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a + b", {"a - b"}),
        ("a / b", {"a * b"}),
        ("a < b", {"a <= b"}),
        ("a == b", {"a != b"}),
        ("a and b", {"a or b"}),
        ("~a", {"a"}),
        ("a if c else b", {"a", "b"}),
        ("True", {"False"}),
        ("0", {"1"}),
        ("0.0", {"1.0"}),
        ("1.5", {"3.0"}),
        ("jnp.where(c, a, b)", {"a", "b"}),
        ("jnp.where(c)", set()),
        ("jnp.maximum(a, b)", {"jnp.minimum(a, b)"}),
        ("jnp.tanh(a)", {"a"}),
        ("f(a, axis=b, **c)", {"f(a, **c)"}),
        ("x.sum(b)", set()),
        ("zip(a, b, strict=True)", set()),
        ("'text'", set()),
    ],
)
def test_ways_to_break_an_expression(expression, expected):
    assert changes_of(expression) == expected


def test_what_computes_is_broken_and_nothing_else():
    found = mutants_of("f.py", SOURCE)
    changed = [mutant.apply(SOURCE) for mutant in found]
    assert len({*changed}) == len(changed) == len(found)
    for source in changed:
        ast.parse(source)
        assert source != SOURCE
    old = {mutant.old for mutant in found}
    assert {"x < 2", "x > 0", "x * 4", "-x", "2.5", "True", "é + 5"} <= old
    assert not old & {"7", "8", "9", "11", "13", "x + 13"}
    (one,) = [mutant for mutant in found if mutant.old == "é + 5"]
    assert one.apply(SOURCE) == SOURCE.replace("é + 5", "(é - 5)")
    assert str(one) == "f.py:14 é + 5 -> é - 5"


def test_a_seed_draws_the_same_and_every_group(repository: pathlib.Path):
    drawn = mutants.draw(25, 1, repository)
    assert drawn == mutants.draw(25, 1, repository)
    assert drawn != mutants.draw(25, 2, repository)
    assert len({*drawn}) == 25
    for group, (patterns, first, folder) in enumerate(mutants.GROUPS):
        files = mutants.files_of(patterns, repository)
        assert files
        paths = {mutant.path for mutant, of in drawn if of == group}
        assert paths
        assert paths <= {*files}
        tests = mutants.ordered_tests("docs/conf.py", group, repository)
        assert tests[: len(first)] == [f"{folder}/test_{name}.py" for name in first]
        assert len(tests) == len({*tests})
    of_softmax = mutants.ordered_tests("pallas_kernels/tpu/softmax.py", 2, repository)
    assert of_softmax[0] == "tests/kernels/test_tpu_softmax.py"
    of_mcmi = mutants.ordered_tests("softlib/losses/_mcmi.py", 4, repository)
    assert of_mcmi[0] == "tests/arguments/test_scalars.py"
    assert mutants.EVERYWHERE in of_mcmi
    operations = "softlib/logits/_engine/operations.py"
    of_operations = mutants.ordered_tests(operations, 0, repository)
    assert "tests/logits/test_gradient_rules.py" in of_operations


@pytest.fixture
def project(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Three expressions that tests look at, one that none does, and a broken test."""
    root = tmp_path / "root"
    (root / "tests/a").mkdir(parents=True)
    files = {
        "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\n",
        "tests/conftest.py": """
            def pytest_addoption(parser):
                parser.addoption("--every")
                parser.addoption("--offset")
        """,
        "good.py": "def f(x):\n    return x + 2\n",
        "idle.py": "def f(x):\n    return x - 2\n",
        "named.py": "def f(x):\n    return x + 4\n",
        "bad.py": "def f(x):\n    return x * 2\n",
        "tests/a/test_good.py": """
            import good
            def test_f(): assert good.f(1) == 3
        """,
        "tests/a/test_named.py": """
            import named, pytest
            @pytest.mark.parametrize("x", [1], ids=lambda x: f"[{named.f(x)}] - 1")
            def test_f(x): assert named.f(x) == 5
        """,
        "tests/a/test_bad.py": """
            import bad
            def test_f(): assert bad.f(3) == 5
        """,
    }
    for name, text in files.items():
        (root / name).write_text(textwrap.dedent(text))
    monkeypatch.setattr(mutants, "ROOT", root)
    return root


@pytest.mark.parametrize(
    ("file", "test", "said"),
    [
        ("good.py", "test_good.py", "killed by tests/a/test_good.py::test_f"),
        ("idle.py", "test_good.py", "SURVIVED"),
        # The mutant changes the name of the case.
        ("named.py", "test_named.py", "killed by tests/a/test_named.py::test_f["),
        ("bad.py", "test_bad.py", "BROKEN without it: tests/a/test_bad.py::test_f"),
    ],
)
def test_verdicts(file, test, said, project, monkeypatch, capsys):
    for path in (project / "tests/a").glob("test_*.py"):
        if path.name != test:
            path.unlink()
    monkeypatch.setattr(mutants, "GROUPS", ((file, (), "tests/a"),))
    before = (project / file).read_text()
    mutants.main(["--count", "1", "--seed", "0", "--jobs", "1"])
    output = capsys.readouterr().out
    assert "1 mutants, --seed 0" in output
    assert said in output
    assert f"{1 * said.startswith('killed')} of 1 killed" in output
    assert (project / file).read_text() == before
