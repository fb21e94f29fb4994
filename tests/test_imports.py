import pathlib
import subprocess
import sys

import pytest

from tests import children, import_rules


def sources(repository: pathlib.Path, *folders: str) -> dict[str, str]:
    paths = [p for folder in folders for p in (repository / folder).rglob("*.py")]
    return {str(path.relative_to(repository)): path.read_text() for path in paths}


def test_every_edge_is_in_the_table(repository: pathlib.Path):
    roots = {path.stem for path in (repository / "softlib").glob("*.py")} - {"__init__"}
    files = sources(repository, "softlib", "pallas_kernels")
    assert len(files) > 10
    found = [
        sentence
        for path, source in files.items()
        for sentence in import_rules.violations(source, pathlib.PurePath(path), roots)
    ]
    assert found == []


def test_nothing_outside_the_library_uses_private_jax_or_star_imports(repository):
    files = sources(repository, "tests", "examples", "benchmarks", "docs", "scripts")
    assert len(files) > 10
    found = [
        sentence
        for path, source in files.items()
        for sentence in import_rules.violations_anywhere(source, pathlib.PurePath(path))
    ]
    assert found == []


def test_every_pair_that_may_reach_into_private_files_does(
    repository: pathlib.Path, monkeypatch
):
    roots = {path.stem for path in (repository / "softlib").glob("*.py")} - {"__init__"}
    pairs = import_rules.REACHES_INTO
    monkeypatch.setattr(import_rules, "REACHES_INTO", set())
    found = {
        (pathlib.PurePath(path).parts[1], sentence.rpartition(" ")[2])
        for path, source in sources(repository, "softlib").items()
        for sentence in import_rules.violations(source, pathlib.PurePath(path), roots)
        if " is private to " in sentence
    }
    assert found == pairs


def test_no_circle_of_imports(repository: pathlib.Path):
    assert import_rules.cycles(sources(repository, "softlib", "pallas_kernels")) == []


def test_kernels_are_imported_where_they_are_called(repository: pathlib.Path):
    files = sources(repository, "softlib", "pallas_kernels")
    assert import_rules.kernels_out_of_place(files) == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import softlib", {"flax", "optax", "pytest", "hypothesis", "chex"}),
        ("import softlib", {"jax.experimental.pallas", "jax.experimental.mosaic"}),
        ("import softlib; softlib.losses, softlib.numerics", {"flax", "optax"}),
        ("import softlib; softlib.testing", {"flax", "optax", "pytest", "hypothesis"}),
        ("import pallas_kernels", {"softlib", "flax", "optax", "jaxtyping"}),
    ],
)
def test_import_loads_no_more_than_it_must(statement, absent, repository):
    code = f"{statement}; import sys; print(*sorted({absent!r} & sys.modules.keys()))"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=repository,
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "\n", "")


PLANNING = """
import sys

import jax
import jax.numpy as jnp

import softlib

given = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
labels = jax.ShapeDtypeStruct((2048,), jnp.int32)
loss = lambda *arrays: softlib.losses.linear_softmax_cross_entropy(*arrays).sum()
head = given(2048, 768), given(50_257, 768)
print(softlib.explain(jax.grad(loss), *head, labels))
array = given(2, 1024, 4, 64)
attend = lambda *arrays: softlib.attention.dot_product_attention(
    *arrays, is_causal=True
).sum()
print(softlib.explain(jax.grad(attend), array, array, array))
print("loaded:", "jax.experimental.pallas" in sys.modules)
"""


def test_planning_kernels_loads_no_kernel(repository):
    """Only a program that is lowered for a TPU or GPU needs the language of kernels."""
    process = subprocess.run(
        [sys.executable, "-c", PLANNING],
        capture_output=True,
        text=True,
        cwd=repository,
        env=children.environment(),
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("  tpu: pallas_tpu") == 4, process.stdout
    assert process.stdout.endswith("loaded: False\n")


# ---------------------------------------------------------------- the rules themselves
ROOTS = {"_checks", "typing"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("softlib/losses/_a.py", "import jax.numpy as jnp\nimport functools"),
        ("softlib/losses/_a.py", "from ._b import c"),
        ("softlib/losses/_a.py", "from softlib.losses._b import c"),
        ("softlib/losses/_a.py", "from softlib.losses import _b"),
        ("softlib/losses/_a.py", "from softlib._checks import c"),
        ("softlib/logits/_a.py", "from ._engine.b import c"),
        ("softlib/logits/_engine/a.py", "from . import b"),
        ("softlib/attention/_engine/a.py", "from softlib.attention._tuples.b import c"),
        ("softlib/losses/_a.py", "from softlib import _checks, typing"),
        ("softlib/losses/_a.py", "from softlib import numerics"),
        ("softlib/losses/_a.py", "from softlib.numerics import RunningMax"),
        ("softlib/logits/_a.py", "import pallas_kernels.tpu"),
        ("softlib/logits/_a.py", "def f():\n    import pallas_kernels.tpu"),
        ("softlib/_dispatch.py", "from softlib import _checks"),
        ("softlib/nn/_a.py", "from flax import nnx\nfrom softlib import losses"),
        ("softlib/optim/_a.py", "import optax"),
        ("softlib/testing/_a.py", "def f():\n    import hypothesis"),
        ("softlib/__init__.py", "import importlib\nfrom softlib import losses"),
        ("softlib/__init__.py", "from softlib._checks import c as c"),
        (
            "softlib/numerics/__init__.py",
            '"""Doc."""\nfrom ._a import b as b\n__all__ = ["b"]',
        ),
        (
            "pallas_kernels/tpu/_a.py",
            "import numpy\nfrom jax.experimental import pallas",
        ),
        ("pallas_kernels/tpu/_a.py", "from pallas_kernels import _tiling"),
    ],
)
def test_allowed(path, source):
    assert import_rules.violations(source, pathlib.PurePath(path), ROOTS) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("softlib/losses/_a.py", "import scipy", "losses may not import scipy"),
        ("softlib/losses/_a.py", "import optax", "losses may not import optax"),
        ("softlib/losses/_a.py", "from flax import nnx", "losses may not import flax"),
        ("softlib/losses/_a.py", "from softlib import nn", "may not import nn"),
        ("softlib/losses/_a.py", "from softlib import attention", "import attention"),
        ("softlib/nn/_a.py", "from softlib.masks._b import c", "private to masks"),
        ("softlib/nn/_a.py", "from softlib.masks import _b", "private to masks"),
        ("softlib/logits/_engine/a.py", "from softlib.logits._b import c", "below _b"),
        ("softlib/losses/_a.py", "import softlib", "not softlib itself"),
        (
            "softlib/losses/_a.py",
            "from softlib import masked_mean",
            "not softlib itself",
        ),
        ("softlib/losses/_a.py", "from softlib.losses import x", "its files"),
        ("softlib/losses/_a.py", "from . import x", "its files"),
        ("softlib/losses/_a.py", "from .. import x", "not softlib itself"),
        ("softlib/losses/_a.py", "def f():\n  import numpy", "inside a function"),
        ("softlib/losses/_a.py", "from jax import *", "star import"),
        ("softlib/losses/_a.py", "from jax._src import core", "private"),
        ("softlib/losses/_a.py", "from jax import _src", "private"),
        ("softlib/losses/_a.py", "import jax\njax._src.core", "private"),
        ("softlib/losses/_a.py", "import importlib", "importlib"),
        (
            "softlib/numerics/_a.py",
            "from softlib import losses",
            "may not import losses",
        ),
        ("softlib/numerics/_a.py", "import pallas_kernels", "import pallas_kernels"),
        ("softlib/_checks.py", "from softlib import numerics", "a root file may not"),
        ("softlib/_checks.py", "import pallas_kernels", "a root file may not"),
        ("softlib/scoring/_a.py", "from softlib import decoding", "import decoding"),
        ("softlib/bandits/_a.py", "from softlib import logs", "may not import logs"),
        ("softlib/nn/_a.py", "from softlib import optim", "may not import optim"),
        ("softlib/testing/_a.py", "import pytest", "testing may not import pytest"),
        ("softlib/helpers/_a.py", "import jax", "no package of the table"),
        ("softlib/numerics/__init__.py", '"""Doc."""\nx = 1', "code in an __init__"),
        ("softlib/numerics/__init__.py", "from ._a import b as b", "doc"),
        (
            "softlib/numerics/__init__.py",
            '"""D."""\nfrom ._a import b',
            "import b as b",
        ),
        ("softlib/numerics/__init__.py", '"""D."""\nfrom ._a import b as b', "__all__"),
        ("pallas_kernels/_a.py", "import softlib", "jax and NumPy only"),
        ("pallas_kernels/_a.py", "import jaxtyping", "jax and NumPy only"),
    ],
)
def test_forbidden(path, source, message):
    found = import_rules.violations(source, pathlib.PurePath(path), ROOTS)
    assert [message in sentence for sentence in found] == [True], found


def test_a_circle_is_named():
    files = {
        "softlib/_a.py": "from softlib import _b",
        "softlib/_b.py": "from softlib._c import x",
        "softlib/_c.py": "from . import _a",
        "softlib/_d.py": "import softlib._a",
    }
    assert import_rules.cycles(files) == [
        "softlib._a -> softlib._b -> softlib._c -> softlib._a"
    ]
    assert import_rules.cycles({**files, "softlib/_c.py": ""}) == []


def test_a_kernel_that_loads_its_language_early_is_named():
    files = {
        "pallas_kernels/_b.py": "from jax.experimental import pallas as pl",
        "pallas_kernels/_c.py": "from . import _b",
        "pallas_kernels/_d.py": "import numpy",
        "softlib/losses/_a.py": "from pallas_kernels import _c, _d",
        "softlib/losses/_e.py": "def f():\n    from pallas_kernels import _b, _d",
    }
    assert import_rules.kernels_out_of_place(files) == [
        "softlib.losses._a:1: pallas_kernels._c loads jax.experimental.pallas",
        "softlib.losses._e:2: pallas_kernels._d belongs to the top",
    ]
