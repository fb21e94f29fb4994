"""A case and its outcome, which processes exchange as JSON."""

import dataclasses
from typing import Any, Self

RIGHT = "right"
# Plain JAX is what users of such a device get: it is checked and timed in its own name.
PLAIN_ONLY = "right, by plain JAX: there is no kernel for this device"


@dataclasses.dataclass(frozen=True)
class Case:
    """The job of one process.

    Attributes:
        problem: The name.
        dtype: Of its floating arrays.
        size: A name among its sizes.
        check: Whether the result is compared with float64.
        rounds: Of the measurement; 0 for none.
        imitated: The platform whose kernels an interpreter runs; None for the device.
    """

    problem: str
    dtype: str
    size: str
    check: bool = True
    rounds: int = 0
    imitated: str | None = None

    def __str__(self) -> str:
        size = f"{self.size} size" if self.check else "times"
        where = f", {self.imitated}" if self.imitated else ""
        return f"{self.problem}, {self.dtype}, {size}{where}"


@dataclasses.dataclass(frozen=True)
class Time:
    """One program on one problem; `reason` says why there are no numbers.

    Attributes:
        pass_: `forward`, or `forward and gradients`.
        program: Its name.
        seconds: Of each round.
        ratio: Median over the rounds of the time by plain JAX's, and its interval.
        of_peak: Share of the peak of the device, and of what.
        temporary_bytes: Beside arguments and results.
        difference: From the results of plain JAX, by their largest value.
        reason: Why it did not run.
    """

    pass_: str
    program: str
    seconds: tuple[float, ...] = ()
    ratio: tuple[float, float, float] | None = None
    of_peak: str = "-"
    temporary_bytes: int | None = None
    difference: float | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The verdict on a case, with its numbers.

    Attributes:
        case: Which.
        verdict: `RIGHT`, `PLAIN_ONLY`, or what is wrong.
        kernels: In the program of the forward pass, and of that with gradients.
        tiles: What softlib says of them.
        errors: Of each result the largest error by the largest value, and the norm of
            the errors by that of the values.
        times: Of a measurement.
        seconds: That the process took.
    """

    case: Case
    verdict: str
    kernels: tuple[int, ...] = ()
    tiles: tuple[str, ...] = ()
    errors: tuple[tuple[float, float], ...] = ()
    times: tuple[Time, ...] = ()
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        return self.verdict in (RIGHT, PLAIN_ONLY)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, also after JSON."""
        times = [
            Time(
                **time
                | {
                    "seconds": tuple(time["seconds"]),
                    "ratio": None if time["ratio"] is None else tuple(time["ratio"]),
                }
            )
            for time in values["times"]
        ]
        return cls(
            Case(**values["case"]),
            values["verdict"],
            tuple(values["kernels"]),
            tuple(values["tiles"]),
            tuple((error[0], error[1]) for error in values["errors"]),
            tuple(times),
            values["seconds"],
        )
