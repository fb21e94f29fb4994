"""Draws `docs/images/architecture.svg`: who may import whom, and the way of one call.

The storeys are those of the table in `tests/import_rules.py`, what is used is read from
the imports, and the way is that of a call that is traced here, forward and back.

    python -m scripts.architecture          # after a change of imports or of the way
    python -m scripts.architecture --check  # says whether the picture is current
"""

import ast
import pathlib
import sys
import textwrap
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import jax
import jax.numpy as jnp

import softlib
from tests import import_rules

ROOT = pathlib.Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/images/architecture.svg"

ROOT_FILES = "softlib/_*.py"
KERNELS = "pallas_kernels"
COLOURS = {
    "numerics": "#4c6ef5",
    "quantize": "#22b8cf",
    "softmax": "#0ca678",
    "masks": "#2f9e44",
    "information": "#74b816",
    "logits": "#e8590c",
    "attention": "#d6336c",
    "recurrent": "#9c36b5",
    "metrics": "#5c7cfa",
    "mining": "#1098ad",
    "losses": "#e03131",
    "decoding": "#7048e8",
    "scoring": "#6741d9",
    "estimation": "#5f3dc4",
    "bandits": "#c2255c",
    "logs": "#a61e4d",
    "optim": "#1971c2",
    "nn": "#343a40",
    "testing": "#868e96",
    KERNELS: "#b08900",
    ROOT_FILES: "#868e96",
}
OF_ROOT = (
    "Files at the root are for all.",
    "Checks, dtypes, sharding, the choice of an implementation, shared numerics.",
)


class Step(NamedTuple):
    """A file on the way of a call, and the function by which the call enters it."""

    file: str
    function: str

    @property
    def package(self) -> str:
        parts = pathlib.PurePath(self.file).parts
        return parts[1] if len(parts) > 2 else ROOT_FILES


# ------------------------------------------------------------------------ what is drawn
def packages() -> list[str]:
    """The packages of the table that exist, in the order of their colours."""
    known = {p for p in import_rules.MAY_IMPORT if (ROOT / "softlib" / p).is_dir()}
    return [*filter(known.__contains__, COLOURS), *sorted(known - COLOURS.keys())]


def permitted(package: str) -> list[str]:
    """Lists what a package may import: packages, and libraries but jax and NumPy."""
    allowed = import_rules.MAY_IMPORT[package]
    known = [p for p in (*packages(), KERNELS) if p in allowed]
    return [*known, *sorted(allowed - {*known, *import_rules.MAY_IMPORT, KERNELS})]


def used() -> dict[str, set[str]]:
    """The packages and libraries that the files of each package import."""
    found: dict[str, set[str]] = {package: set() for package in packages()}
    for package in found:
        for path in (ROOT / "softlib" / package).rglob("*.py"):
            relative = path.relative_to(ROOT)
            tree = ast.parse(path.read_text())
            for _, module, name in import_rules.imported_modules(tree, relative):
                top, *rest = module.split(".")
                target = (rest[0] if rest else name) if top == "softlib" else top
                found[package].add(str(target))
    return found


def storeys() -> list[list[str]]:
    """Packages from the ground up: each stands above all that it may import."""
    heights: dict[str, int] = {}

    def height(package: str) -> int:
        if package not in heights:
            below = [p for p in permitted(package) if p in import_rules.MAY_IMPORT]
            heights[package] = max(map(height, below), default=-1) + 1
        return heights[package]

    found: dict[int, list[str]] = {}
    for package in packages():
        found.setdefault(height(package), []).append(package)
    return [found[each] for each in sorted(found)]


def purpose(package: str) -> str:
    """The first line of the package's docstring."""
    folder = ROOT / package if package == KERNELS else ROOT / "softlib" / package
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    return (docstring or "").split("\n")[0].replace("`", "")


def way() -> tuple[list[Step], list[Step]]:
    """Files that a cross-entropy of LinearLogits goes through, and its derivative.

    Each is the deepest of all stacks of calls while JAX traces it. Sizes are those of
    no test: what JAX has traced before, it does not trace again.
    """
    forward: list[Step] = []
    backward: list[Step] = []
    deepest = forward
    inside = str(ROOT / "softlib")

    def notice(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(inside):
            steps = _steps(frame)
            if len(steps) > len(deepest):
                deepest[:] = steps

    def call(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> Any:
        nonlocal deepest

        def loss(hidden: jax.Array, weight: jax.Array) -> jax.Array:
            logits = softlib.LinearLogits(hidden, weight)
            return softlib.losses.softmax_cross_entropy(logits, labels)

        before = sys.getprofile()
        sys.setprofile(notice)
        try:
            value, pull = jax.vjp(loss, hidden, weight)
            deepest = backward
            return pull(jnp.ones_like(value))
        finally:
            sys.setprofile(before)

    array = jax.ShapeDtypeStruct
    rows, features, classes = 61, 17, 1009
    jax.eval_shape(
        call,
        array((rows, features), jnp.float32),
        array((classes, features), jnp.float32),
        array((rows,), jnp.int32),
    )
    return forward, backward


def _steps(frame: FrameType | None) -> list[Step]:
    """The files of softlib on the stack, from the outside in, each run of one once."""
    found: list[Step] = []
    while frame is not None:
        path = pathlib.Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "softlib"):
            parts = frame.f_code.co_qualname.replace("<locals>.", "").split(".")
            name = ".".join(parts[-2:])
            step = Step(str(path.relative_to(ROOT)), name)
            if found and found[-1].file == step.file:
                found.pop()
            found.append(step)
        frame = frame.f_back
    return found[::-1]


# ------------------------------------------------------------------------------ drawing
SANS = "Inter, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, Menlo, 'DejaVu Sans Mono', monospace"
MARGIN, GAP = 24, 10
BUILDING = 640  # the width of the storeys
COLUMN, STEP = 236, 36  # the width of a way, the height of a step on it
TOP = 70
# Of a letter of that size, in the widest of these fonts, in average.
LETTER = {8.6: 5.4, 9.4: 5.45}
CALL = "softmax_cross_entropy(LinearLogits(hidden, weight), labels)"
INK, SOFT, LINE = "#212529", "#6c757d", "#ced4da"


def text(
    x: float, y: float, words: str, size: float, fill: str = INK, **style: str
) -> str:
    style = {"font-family": SANS, **{k.replace("_", "-"): v for k, v in style.items()}}
    marks = "".join(f' {name}="{value}"' for name, value in style.items())
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}"{marks}>'
        f"{escape(words)}</text>"
    )


def box(
    x: float, y: float, width: float, height: float, fill: str, **style: str
) -> str:
    marks = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in style.items())
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'fill="{fill}"{marks}/>'
    )


def chips(
    names: list[str], filled: set[str], x: float, y: float, width: float
) -> tuple[list[str], float]:
    """Small labels in lines, and the height that they take."""
    drawn: list[str] = []
    left, begin = x, y
    for name in names:
        size = 12 + LETTER[8.6] * len(name)
        if left > x and left + size > x + width:
            left, y = x, y + 17
        colour = COLOURS.get(name, INK)
        inside, letters = (colour, "white") if name in filled else ("none", colour)
        shape = {"rx": "7", "stroke": colour, "stroke_width": "0.8"}
        drawn += [
            box(left, y, size, 14, inside, **shape),
            text(left + size / 2, y + 10, name, 8.6, letters, text_anchor="middle"),
        ]
        left += size + 4
    return drawn, y - begin + 14 if names else 0


class Package(NamedTuple):
    """The text of a box: name, a line about it, what it may import and what it does."""

    name: str
    about: str
    needs: list[str]
    uses: set[str]

    def lines(self, width: float) -> list[str]:
        return textwrap.wrap(self.about, int((width - 16) / LETTER[9.4]))

    def height(self, width: float) -> float:
        _, labels = chips(self.needs, self.uses, 0, 0, width - 18)
        return 31 + 12 * len(self.lines(width)) + labels + (7 if self.needs else 0)

    def draw(self, x: float, y: float, width: float, height: float) -> list[str]:
        colour = COLOURS[self.name]
        drawn = [
            box(x, y, width, height, "white", rx="6", stroke=LINE),
            box(x, y, width, 4, colour, rx="2"),
            text(x + 9, y + 21, self.name, 13, colour, font_weight="700"),
        ]
        y += 35
        for line in self.lines(width):
            drawn.append(text(x + 9, y, line, 9.4, SOFT))
            y += 12
        labels, _ = chips(self.needs, self.uses, x + 9, y - 4, width - 18)
        return drawn + labels


def building() -> tuple[list[str], float]:
    """The storeys from the top down, and where the ground ends."""
    imports = used()
    rows = [
        [Package(p, purpose(p), permitted(p), imports[p]) for p in row]
        for row in reversed(storeys())
    ]
    ground = {ROOT_FILES: OF_ROOT[1], KERNELS: purpose(KERNELS)}
    rows.append([Package(name, about, [], set()) for name, about in ground.items()])
    drawn: list[str] = []
    y = float(TOP)
    for row in rows:
        width = (BUILDING - GAP * (len(row) - 1)) / len(row)
        height = max(package.height(width) for package in row)
        for place, package in enumerate(row):
            drawn += package.draw(MARGIN + place * (width + GAP), y, width, height)
        y += height + GAP
    return drawn, y - GAP


def steps_of(way: list[Step], x: float, first: int) -> Iterator[str]:
    """A column of steps that begins in the given line."""
    y = TOP + STEP * first
    end = y + STEP * (len(way) - 1) + 15
    yield (
        f'<path d="M{x + 5:g} {y + 15:g}V{end:g}" stroke="{LINE}" stroke-width="2"/>'
    )
    for step in way:
        colour = COLOURS[step.package]
        yield f'<circle cx="{x + 5:g}" cy="{y + 15:g}" r="5" fill="{colour}"/>'
        yield text(x + 18, y + 13, step.function, 10.4, INK, font_family=MONO)
        file = step.file.removeprefix("softlib/")
        yield text(x + 18, y + 26, file, 9.4, colour, font_family=MONO)
        y += STEP


def draw() -> str:
    """Returns the picture."""
    forward, backward = way()
    files = [step.file for step in forward]
    # What is on both ways stands side by side.
    first = files.index(backward[0].file)
    left = MARGIN + BUILDING + 40
    storeys_drawn, ground = building()
    about = "A box names the packages that it may import; filled: it does."
    parts = [
        *storeys_drawn,
        text(MARGIN, 34, "Who may import whom", 17, font_weight="700"),
        text(MARGIN, 53, f"{about} {OF_ROOT[0]}", 11, SOFT),
        text(left, 34, "The way of one call", 17, font_weight="700"),
        text(left, 53, CALL, 10.4, SOFT, font_family=MONO),
    ]
    right = left + COLUMN + 20
    parts += [
        *steps_of(forward, left, 0),
        text(right, TOP + STEP * first - 12, "and back", 13, font_weight="700"),
        *steps_of(backward, right, first),
    ]
    width = right + COLUMN
    lines = max(len(forward), first + len(backward))
    height = max(ground, TOP + STEP * lines) + MARGIN
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}">',
            box(0, 0, width, height, "white", rx="10"),
            *parts,
            "</svg>\n",
        ]
    )


def main(arguments: list[str]) -> int:
    picture = draw()
    if "--check" in arguments:
        return int(picture != PICTURE.read_text())
    PICTURE.write_text(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
