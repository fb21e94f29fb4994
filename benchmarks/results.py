"""The records of a run, and their form on disk."""

import dataclasses
import json
from typing import Any

from .cases import Case
from .measure import Ratio

# A mean loss that is off by more nats than this is called wrong.
WRONG = 1e-3


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """One program of a case.

    Attributes:
        program: Its name.
        seconds: Of every round.
        ratio: Of its time by that of its yardstick; without an interval (0 coverage) if
            it ran in another process.
        temporary_bytes: Scratch memory; None if unknown.
        reason: Why there are no numbers; None if there are.
    """

    program: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    ratio: Ratio | None = None
    temporary_bytes: int | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Speed:
    case: Case
    foreign_cores: float
    rows: list[SpeedRow]

    @property
    def rounds(self) -> int:
        return max((len(row.seconds) for row in self.rows), default=0)

    @property
    def work(self) -> int:
        return self.case.rows * self.case.features * self.case.vocabulary

    def row(self, program: str) -> SpeedRow | None:
        return next((row for row in self.rows if row.program == program), None)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of one program against float64.

    Attributes:
        program: Its name.
        case: Where; the worse of its layouts.
        loss: Mean loss minus the true one, nats.
        hidden: Largest error of the gradient by its largest element.
        weight: The same for the weight.
        reason: Why there are no numbers.
    """

    program: str
    case: Case
    loss: float | None = None
    hidden: float | None = None
    weight: float | None = None
    reason: str | None = None

    @property
    def wrong(self) -> bool:
        # Written so that a NaN is wrong.
        return self.loss is not None and not abs(self.loss) <= WRONG


@dataclasses.dataclass(frozen=True)
class Temporaries:
    """Scratch memory of one program at a head that is only compiled."""

    program: str
    head: str
    case: Case
    bytes: int | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a number grows with one size: `values` about proportional to size**exponent.

    Attributes:
        program: Its name.
        quantity: "seconds" or "temporary bytes".
        size: "N" or "V"; the other sizes are those of `case`.
        case: The largest case.
        sizes: In rising order.
        values: One each.
        exponent: Of the fit.
    """

    program: str
    quantity: str
    size: str
    case: Case
    sizes: list[int]
    values: list[float]
    exponent: float


@dataclasses.dataclass(frozen=True)
class Results:
    machine: dict[str, str]
    speed: list[Speed]
    errors: list[Errors]
    temporaries: list[Temporaries]
    growth: list[Growth]


def to_json(results: Results) -> str:
    return json.dumps(dataclasses.asdict(results), indent=1) + "\n"


def from_json(text: str) -> Results:
    read: dict[str, Any] = json.loads(text)

    def with_case(kind: Any, record: dict[str, Any]) -> Any:
        return kind(**{**record, "case": Case(**record["case"])})

    def speed_row(record: dict[str, Any]) -> SpeedRow:
        if record["ratio"] is not None:
            record["ratio"] = Ratio(**record["ratio"])
        return SpeedRow(**record)

    return Results(
        read["machine"],
        [
            with_case(Speed, {**s, "rows": [speed_row(row) for row in s["rows"]]})
            for s in read["speed"]
        ],
        [with_case(Errors, record) for record in read["errors"]],
        [with_case(Temporaries, record) for record in read["temporaries"]],
        [with_case(Growth, record) for record in read["growth"]],
    )
