"""The command for accelerators, rehearsed on what there is."""

import dataclasses

import pytest

from benchmarks import accelerator
from benchmarks.accelerator_problems import PROBLEMS
from tests.host import jnp

LOGSUMEXP = next(p for p in PROBLEMS if p.name == "logsumexp")
SMALL = dataclasses.replace(
    LOGSUMEXP.small, shapes=((5, 130),), flops=1.0, moved=2.0 * 5 * 130
)


def test_a_problem_is_checked_and_timed(monkeypatch, capsys):
    problem = dataclasses.replace(LOGSUMEXP, small=SMALL)
    monkeypatch.setattr(accelerator, "PROBLEMS", (problem,))
    assert accelerator.main(["--rehearse"]) == 0
    text = capsys.readouterr().out
    assert "| logsumexp | right |" in text
    assert "| logsumexp | softlib xla |" in text
    assert "| logsumexp | jax.nn |" in text


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    wrong = lambda x: jnp.max(x, axis=-1)
    problem = dataclasses.replace(LOGSUMEXP, small=SMALL, program=lambda name: wrong)
    monkeypatch.setattr(accelerator, "PROBLEMS", (problem,))
    assert accelerator.main(["--rehearse"]) == 1
    text = capsys.readouterr().out
    assert "largest error" in text
    assert "softlib xla" not in text


def test_a_figure(tmp_path):
    rows = [
        accelerator.Row("a", accelerator.OURS, 1.0),
        accelerator.Row("a", accelerator.PLAIN, 2.0),
        accelerator.Row("b", accelerator.OURS, reason="no"),
    ]
    accelerator.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_without_an_accelerator_it_says_so(capsys):
    assert accelerator.main([]) == 2
    assert "--rehearse" in capsys.readouterr().err


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_large_sizes_are_traced(problem):
    """At their large sizes, so that a device is not where a mistake is found."""
    import jax

    shapes = [
        jax.ShapeDtypeStruct(
            shape, jnp.int32 if i in problem.large.integers else jnp.bfloat16
        )
        for i, shape in enumerate(problem.large.shapes)
    ]
    assert jax.eval_shape(problem.program(None), *shapes).shape
