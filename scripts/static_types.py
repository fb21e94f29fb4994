"""Asks the type checkers of users what public functions return.

pyright and mypy check `tests/static_types` and a file that this program writes, which
reveals the type of every public function, method and property. A result that a checker
takes for `Any` is an error: whatever a user does with it goes unchecked. The third
checker, pyrefly, checks the whole repository and does not reveal types here.

    python -m scripts.static_types
"""

import inspect
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tests import public_names

ROOT = pathlib.Path(__file__).resolve().parent.parent
USES = ROOT / "tests/static_types"
# pyright looks at no folder whose name begins with a dot.
REVEALING = ROOT / "build/static_types/reveals_public_types.py"

# Results that no annotation can name, and why, by a pattern of their addresses.
MASK = "an array of NumPy or JAX, as the indices are, or a Python bool"
PYTREE = "a pytree of the caller's"
STATE = "whatever the author of a processor or a draft remembers"
ANY = {
    r"softlib\.decoding\.\w+\.(init|process|advance|rewind)": STATE,
    r"softlib\.logits\.BlockwiseLogits\.prepared": "what the author's `block` reads",
    r"softlib\.masks\.(array|mask)_field": "for any field, as `dataclasses.field`",
    r"softlib\.masks\.\w+\.(__call__|attends|block_status)": MASK,
    r"softlib\.masks\.\w+\.(row_count|materialize)": MASK,
    r"softlib\.masks\.plot": "matplotlib need not be installed",
    r"softlib\.metrics\.naive_loss_minimization_alignment": PYTREE,
    r"softlib\.numerics\.\w+\.mean": PYTREE,
}

# path:line[:column][ - ][: ]severity: text
_LINE = re.compile(r"(?P<place>\S+?:\d+)(?::\d+)?(?: -|:) (?P<kind>\w+): (?P<text>.*)")
_REVEALED = re.compile(r'(?:Revealed type|Type of ".*?") is "(.*)"')


def addresses() -> Iterator[str]:
    """Yields public functions, and public methods and properties of classes."""
    for public in public_names.public_names():
        if inspect.isclass(public.value):
            for name in public_names.public_methods(public.value):
                yield f"{public.address}.{name}"
        elif inspect.isroutine(public.value):
            yield public.address


def results(revealed: str) -> list[str]:
    """Returns the types of the results of a function, one for each overload.

    The type is `(x: int) -> Array`, `Overload[(x: int) -> Array, ...]`, or one of these
    as mypy writes them. That of a property is its own result.
    """
    signatures = re.sub(r"^Overload[\[(](.*)[\])]$", r"\1", revealed)
    found = []
    for part in _parts(signatures, ", "):
        _, *result = _parts(part, " -> ")
        # mypy leaves out that a function returns None.
        no_result = "None" if part.startswith("def ") else part
        found.append(" -> ".join(result) or no_result)
    return found


def is_known(result: str) -> bool:
    """Whether a type, or every type of a tuple, is another than Any."""
    is_named_tuple = ", fallback=" in result  # which mypy writes as a tuple
    of_tuple = re.fullmatch(r"tuple\[(.*)\]", result)
    if of_tuple and not is_named_tuple:
        return all(map(is_known, _parts(of_tuple[1], ", ")))
    return result not in ("Any", "Unknown")


def _parts(text: str, separator: str) -> list[str]:
    """Splits a text where the separator is within no brackets."""
    found, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and text.startswith(separator, place):
            found.append(text[begin:place])
            begin = place + len(separator)
    return [*found, text[begin:]]


def complaints(output: str, asked: Sequence[str]) -> list[str]:
    """Returns the errors in what a checker says, and the results that it cannot name.

    `asked` is what the lines of the revealing file ask about, from its second on.
    """
    wrong, told = [], set()
    for match in map(_LINE.match, map(str.strip, output.splitlines())):
        if match is None:
            continue
        revealed = _REVEALED.match(match["text"])
        path, _, line = match["place"].rpartition(":")
        if match["kind"] == "error":
            wrong.append(match[0])
        elif revealed and path.endswith(REVEALING.name):
            address = asked[int(line) - 2]
            told.add(address)
            unknown = [each for each in results(revealed[1]) if not is_known(each)]
            if unknown and not any(re.fullmatch(each, address) for each in ANY):
                wrong.append(f"{address} returns {', '.join(unknown)}")
    if not told and not wrong:
        wrong.append(f"it has not run: {output.strip()}")
    elif missing := [address for address in asked if address not in told]:
        wrong.append(f"{len(missing)} types are not revealed, of {missing[0]} for one")
    return wrong


def main() -> int:
    asked = list(addresses())
    REVEALING.parent.mkdir(parents=True, exist_ok=True)
    lines = ["import softlib", *(f"reveal_type({address})" for address in asked)]
    REVEALING.write_text("\n".join(lines) + "\n")
    files = [str(USES), str(REVEALING)]
    python = [sys.executable, "-m"]
    commands = {
        "mypy": [*python, "mypy", *files],
        "pyright": [*python, "pyright", "--pythonpath", sys.executable, *files],
    }
    running = {
        name: subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for name, command in commands.items()
    }
    failed = False
    for name, process in running.items():
        output, _ = process.communicate()
        wrong = complaints(output, asked)
        print(*(f"{name}: {each}\n" for each in wrong), sep="", end="")
        print(f"{name}: {len(asked)} public results, errors: {len(wrong)}")
        failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
