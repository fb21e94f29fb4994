"""The switch that keeps a process off kernels, and the guard against bad assemblers."""

import subprocess
import sys

import jax
import pytest
from jax import export

import softlib
from softlib import _ptxas
from tests.host import jnp
from tests.test_dispatch import DOUBLE, ROWS, double

X = jnp.ones(ROWS)


def _program(function, platform="tpu"):
    return export.export(function, platforms=[platform])(X).mlir_module()


def test_a_preferred_name_serves_every_call_that_names_none():
    with softlib.implementations("xla"):
        assert "cbrt" not in _program(jax.jit(double))
    assert "cbrt" in _program(jax.jit(double))


def test_a_function_that_was_compiled_under_another_preference_is_compiled_again():
    function = jax.jit(double)
    function(X)
    for names in ((), ("xla",), ("reference",), ()):
        with softlib.implementations(*names):
            text = str(softlib.explain(function, X))
            expected = f"everywhere: {names[0]}" if names else "tpu: pallas_tpu"
            assert expected in text
            assert ("cbrt" in _program(function)) == (not names)


def test_a_call_that_names_an_implementation_is_not_touched():
    with softlib.implementations("xla"):
        pinned = jax.jit(lambda x: double(x, "pallas"))
        assert "cbrt" in _program(pinned)


def test_inside_another_preference_the_inner_one_counts():
    with softlib.implementations("reference"):
        with softlib.implementations():
            assert "tpu: pallas_tpu" in str(softlib.explain(double, X))
        assert "everywhere: reference" in str(softlib.explain(double, X))


def test_names_are_tried_in_their_order_and_strictly():
    with softlib.implementations("pallas", "reference"):
        assert "elsewhere: reference" in str(softlib.explain(double, X))
    with (
        softlib.implementations("pallas"),
        pytest.raises(NotImplementedError, match="not pallas_tpu: needs an even"),
    ):
        double(jnp.ones(3))


def test_an_operation_without_any_of_the_names_is_plain():
    few = [i for i in DOUBLE.implementations if i.name != "reference"]
    operation = softlib._dispatch.Operation("few", tuple(few))
    with softlib.implementations("reference"):
        made = softlib._dispatch.plan(operation, None, None, X)
    assert str(made.explained) == "few\n  everywhere: xla"


def test_it_decorates_functions():
    decorated = softlib.implementations("xla")(lambda: str(softlib.explain(double, X)))
    assert "everywhere: xla" in decorated()


def test_an_unknown_name_lists_the_known_ones():
    message = "implementations: a name must be one of xla.*, got 'triton'"
    with pytest.raises(ValueError, match=message), softlib.implementations("triton"):
        pass


@pytest.mark.parametrize(
    ("value", "expected"),
    [("xla", "everywhere: xla"), (" pallas , xla", "tpu: pallas_tpu"), ("", "tpu: ")],
)
def test_the_environment_is_read_when_softlib_is_imported(value, expected):
    program = (
        "import jax.numpy as jnp, softlib; "
        "print(softlib.explain(softlib.softmax.softmax, jnp.zeros((2048, 1024))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"SOFTLIB_IMPLEMENTATIONS": value, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in done.stdout


# --------------------------------------------------------------------------- assemblers
# Whether they are refused.
RELEASES = {
    "12.6.85": False,
    "12.8.61": True,
    "12.8.93": True,
    "12.9.41": True,
    "12.9.86": False,
    "13.0.48": False,
}


@pytest.mark.parametrize("release", RELEASES)
def test_releases_that_miscompile_are_refused(release):
    major, minor, _ = release.split(".")
    text = (
        "ptxas: NVIDIA (R) Ptx optimizing assembler\n"
        f"Cuda compilation tools, release {major}.{minor}, V{release}\n"
    )
    reason = _ptxas.reason_against(_ptxas.version_in(text))
    assert (reason is not None) == RELEASES[release]
    assert reason is None or f"ptxas {release} miscompiles" in reason


def test_an_assembler_that_is_not_found_or_says_nothing_is_no_reason():
    assert _ptxas.reason_against(None) is None
    assert _ptxas.version_in("no version here") is None


def test_a_bad_assembler_matters_on_a_machine_with_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(_ptxas, "installed", lambda: (12, 8, 93))
    assert _ptxas.why_not() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = str(softlib.explain(softlib.softmax.softmax, jnp.zeros((2048, 1024))))
    assert "not pallas_gpu: ptxas 12.8.93 miscompiles kernels" in text
