"""Breaks one expression at a time and asks whether a test notices: `make mutants`.

Mutants are drawn by a seed that is printed, as many from each group of files. Each is
tried in a copy of the tree by the tests of its package, as `make test` selects them, up
to the first failure. It counts as killed if that test passes without the mutant, in all
its cases: a mutant may change their names. What survives either changes no result, or
shows what no test looks at.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from scripts.mutations import Mutant, mutants_of
from tests import selection

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Groups of files with the tests that try them; of these first the files that are named.
GROUPS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "softlib/logits/_engine/{stream,tile,tile_gradient,operations}.py",
        (
            "row_statistics",
            "row_statistics_promises",
            "cross_entropy",
            "gradient_filter",
        ),
        "tests/losses",
    ),
    (
        "softlib/attention/_engine/{stream,tiles,scores,batch_heads}.py",
        ("attention", "softplus", "attention_promises"),
        "tests/attention",
    ),
    (
        "pallas_kernels/_row_formulas.py pallas_kernels/tpu/_row_{math,filter}.py "
        "pallas_kernels/tpu/attention_{weights,pieces}.py "
        "pallas_kernels/tpu/{decode_chunk,trilinear_math,softmax}.py "
        "pallas_kernels/gpu_mosaic/{attention_scores,attention_mask,softmax}.py",
        ("tpu_attention", "tpu_row_statistics", "gpu_attention", "gpu_softmax"),
        "tests/kernels",
    ),
    ("softlib/masks/_*.py", ("against_definition", "values"), "tests/masks"),
    (
        "softlib/losses/_*.py softlib/logits/_*.py",
        ("cross_entropy", "errors"),
        "tests/losses",
    ),
)
# Quick tests that look at every public function; tried for every mutant.
EVERYWHERE = "tests/public/test_defaults.py"
LATE = "late"
FASTER = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)


# --------------------------------------------------------------------------------- draw
def files_of(patterns: str, root: pathlib.Path) -> list[str]:
    """Files by patterns with `{this,that}`, in the order of the alphabet."""
    found = set()
    for pattern in patterns.split():
        before, brace, rest = pattern.partition("{")
        inside, _, after = rest.partition("}")
        for word in inside.split(",") if brace else [""]:
            found |= {*root.glob(before + word + after)}
    return sorted(str(path.relative_to(root)) for path in found)


def draw(count: int, seed: int, root: pathlib.Path) -> list[tuple[Mutant, int]]:
    """Mutants with their groups, of which each gives as many; so do their files."""
    chance, drawn = random.Random(seed), []
    files = [files_of(patterns, root) for patterns, _, _ in GROUPS]
    known: dict[str, list[Mutant]] = {}
    while len(drawn) < count:
        group = len(drawn) % len(GROUPS)
        path = chance.choice(files[group])
        if path not in known:
            known[path] = mutants_of(path, (root / path).read_text())
        chosen = chance.choice(known[path]) if known[path] else None
        if chosen and all(chosen != mutant for mutant, _ in drawn):
            drawn.append((chosen, group))
    return drawn


# ---------------------------------------------------------------------------------- try
def pytest_command(options: Sequence[str], tests: Sequence[str]) -> list[str]:
    quiet = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=no"]
    return [sys.executable, "-m", "pytest", *quiet, *options, *tests]


def ordered_tests(path: str, group: int, root: pathlib.Path) -> list[str]:
    """The files of the group's tests: first those that share most words with the path.

    Then those that look at the results of the whole group. A file of another folder is
    among them if it names a public function of the path, or imports its module.
    """
    _, first, folder = GROUPS[group]
    words = lambda path: {*re.split(r"[/_.]+", path)} - {*folder.split("/"), "py"}
    rank = {f"{folder}/test_{name}.py": i for i, name in enumerate(first)}
    source = root / path
    public = re.findall(r"^@array_arguments.*\ndef (\w+)", source.read_text(), re.M)
    package = re.escape(str(pathlib.PurePath(path).parent).replace("/", "."))
    module = pathlib.PurePath(path).stem
    imported = rf"^from {package}(\.{module} import | import .*\b{module}\b)"
    words_of = [imported, *(rf"\b{name}\b" for name in public)]
    named = re.compile("|".join(words_of), re.M)
    places: dict[str, tuple[int, int]] = {}
    for file in (root / "tests").rglob("test_*.py"):
        name = str(file.relative_to(root))
        shared = len(words(path) & words(name))
        if file.parent == root / folder:
            places[name] = (-shared, rank.get(name, len(first)))
        elif named.search(file.read_text()):
            places[name] = (-1, len(first))
        elif name == EVERYWHERE:
            places[name] = (0, len(first))
    return sorted(places, key=lambda name: (*places[name], name))


class Copy:
    """A copy of the tree, in which mutants are tried one after another."""

    def __init__(self, root: pathlib.Path, folder: pathlib.Path):
        ignored = shutil.ignore_patterns(".*", "_build", "__pycache__", "build", "dist")
        self.folder, self.root = folder, root
        shutil.copytree(root, folder, ignore=ignored)

    def failure(self, command: Sequence[str], seconds: float) -> str | None:
        """The first test that fails, or what else went wrong; None if all pass."""
        cache = self.root / ".cache/mutants"
        environment = os.environ | {
            "XLA_FLAGS": FASTER,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        environment.pop("PYTHONPATH", None)
        try:
            done = subprocess.run(
                *(command,),
                cwd=self.folder,
                env=environment,
                timeout=seconds,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return LATE
        if done.returncode == 0:
            return None
        failed = re.search(
            r"^(?:FAILED|ERROR) (\S+?\.py(?:::.*?)?)(?: - |$)", done.stdout, re.M
        )
        return (
            failed[1] if failed else f"pytest: {done.stdout[-300:]}{done.stderr[-300:]}"
        )

    def attempt(
        self, mutant: Mutant, command: Sequence[str], seconds: float
    ) -> str | None:
        file = self.folder / mutant.path
        source = file.read_text()
        file.write_text(mutant.apply(source))
        try:
            return self.failure(command, seconds)
        finally:
            file.write_text(source)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, help="of the draw; by default the time")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--every", type=int, default=6, help="as in `make test`")
    parser.add_argument("--offset", type=int, help="as in `make test`")
    parser.add_argument("--seconds", type=float, default=1500, help="for one mutant")
    parser.add_argument("--list", action="store_true", help="draw, but try nothing")
    given = parser.parse_args(arguments)
    seed = int(time.time()) if given.seed is None else given.seed
    drawn = draw(given.count, seed, ROOT)
    print(f"{len(drawn)} mutants, --seed {seed}", flush=True)
    if given.list:
        print(*(mutant for mutant, _ in drawn), sep="\n")
        return
    offset = selection.commits(ROOT) if given.offset is None else given.offset
    options = ["--every", str(given.every), "--offset", str(offset)]
    fine: set[str] = set()  # tests that pass without a mutant

    def verdict(mutant: Mutant, group: int) -> str:
        tree = trees.get()
        try:
            tests = ordered_tests(mutant.path, group, ROOT)
            failed = tree.attempt(mutant, pytest_command(options, tests), given.seconds)
            if failed == LATE:  # by a loop without an end, or by a slow machine
                return f"UNDECIDED after {given.seconds:g} s"
            # Not a test: then nothing could be collected, for instance.
            test = (failed or "").partition("[")[0]
            again = [test] if "::" in test else ["--collect-only", *tests]
            if failed and again[-1] not in fine:
                if tree.failure(pytest_command(options, again), given.seconds):
                    return f"BROKEN without it: {failed}"
                fine.add(again[-1])
        finally:
            trees.put(tree)
        return f"killed by {failed}" if failed else "SURVIVED"

    trees: queue.Queue[Copy] = queue.Queue()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(given.jobs):
            trees.put(Copy(ROOT, pathlib.Path(folder, str(i))))
        with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
            found = pool.map(lambda pair: verdict(*pair), drawn)
            verdicts = []
            for (mutant, _), said in zip(drawn, found, strict=True):
                verdicts.append(said)
                print(f"{len(verdicts):3} {mutant}\n      {said}", flush=True)
    killed = sum(said.startswith("killed") for said in verdicts)
    print(f"{killed} of {len(verdicts)} killed")


if __name__ == "__main__":
    main()
