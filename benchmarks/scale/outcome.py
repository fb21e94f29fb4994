"""What was read from a compiled training step, and its form on disk."""

import dataclasses
import json
import pathlib
from typing import Any

from .collectives import Collective
from .model import Model

NUMBERS = pathlib.Path(__file__).parents[1] / "scale.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step to compile.

    Attributes:
        division: Name of one of `divisions.DIVISIONS`.
        head: `softlib`, or `stored` logits.
        devices: How many.
        host: How many of them have fast links among each other.
        target: What it is compiled for: `h100`, or `cpu`.
    """

    division: str
    head: str
    devices: int
    host: int
    target: str

    @property
    def name(self) -> str:
        """Of a file."""
        division = self.division.replace(",", "").replace(" ", "-")
        return f"{self.target}-{self.devices}-{division}-{self.head}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All numbers are of one device and one step; `error` says why there are none.

    Attributes:
        case: What was compiled.
        error: A sentence; None if it compiled.
        tokens: Tokens of the batch by the number of devices.
        flops: Of matrix products.
        unknown_loops: Loops whose steps only the devices know; their bodies count once.
        argument_bytes: Of parameters, states of the optimizer, and tokens.
        temporary_bytes: The peak of everything else.
        kernels: Number of calls of kernels in the text.
        collectives: By kind, and by who takes part.
        seconds: Of tracing and compiling.
    """

    case: Case
    error: str | None = None
    tokens: int = 0
    flops: int = 0
    unknown_loops: int = 0
    argument_bytes: int = 0
    temporary_bytes: int = 0
    kernels: int = 0
    collectives: tuple[Collective, ...] = ()
    seconds: float = 0.0

    @property
    def memory(self) -> int:
        """Results take the place of the arguments."""
        return self.argument_bytes + self.temporary_bytes

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Outcome":
        """The inverse of `dataclasses.asdict`, also after JSON."""
        exchanges = tuple(Collective(**each) for each in values["collectives"])
        parts: dict[str, Any] = {
            "case": Case(**values["case"]),
            "collectives": exchanges,
        }
        return cls(**{**values, **parts})


@dataclasses.dataclass(frozen=True)
class Results:
    """Outcomes of a model, and the versions of what compiled it."""

    model: Model
    versions: dict[str, str]
    outcomes: tuple[Outcome, ...]

    def find(self, division: str, head: str, devices: int) -> Outcome | None:
        """The outcome that compiled, if there is one."""
        key = (division, head, devices)
        for each in self.outcomes:
            case = each.case
            if (case.division, case.head, case.devices) == key and each.error is None:
                return each
        return None


def to_json(results: Results) -> str:
    return json.dumps(dataclasses.asdict(results), indent=1) + "\n"


def from_json(text: str) -> Results:
    read = json.loads(text)
    outcomes = tuple(map(Outcome.of, read["outcomes"]))
    return Results(Model(**read["model"]), read["versions"], outcomes)
