"""Real series as windows of the past and the bin of what follows."""

import hashlib
import math
import pathlib
from typing import NamedTuple

import numpy as np
from language_model.failures import Failure
from study.packed_text import read_text

CREDIT = (
    "Brent spot price: U.S. Energy Information Administration; sunspot numbers: NOAA "
    "National Geophysical Data Center; both public domain"
)


class Forecast(NamedTuple):
    """A question about a series, cut into bins of [-1, 1].

    Attributes:
        title: What is asked.
        unit: Of the target.
        scale: Half the width of the range, in `unit`.
        middle: Centre of the range.
        past: (N, P), standardised.
        target: (N,), in [-1, 1]; what lies outside of the range is at its end.
        outside: Share of the targets that lies outside.
        train: How many windows come before the split in time. Those that reach over
            it are in neither part.
        digest: Of the file.
    """

    title: str
    unit: str
    scale: float
    middle: float
    past: np.ndarray
    target: np.ndarray
    outside: float
    train: int
    digest: str

    def labels(self, bins: int) -> np.ndarray:
        place = np.floor((self.target + 1) / 2 * bins).astype(np.int32)
        return np.clip(place, 0, bins - 1)  # 1 itself belongs to the last bin

    def centres(self, bins: int) -> np.ndarray:
        """In `unit`."""
        return self.middle + self.scale * (-1 + (2 * np.arange(bins) + 1) / bins)

    def part(self, held_out: bool) -> slice:
        gap = self.past.shape[1] + 12
        return slice(self.train + gap, None) if held_out else slice(0, self.train)


def load(path: pathlib.Path) -> dict[str, Forecast]:
    raw, series = _read(path)
    digest = hashlib.sha256(raw).hexdigest()
    returns = np.diff(np.log(series["brent"]))
    spots = series["sunspots"]
    return {
        "brent": _forecast(
            "Brent crude oil: return of the next day, given 20 days",
            "%",
            *_windows(100 * returns, 20, 1),
            (-8, 8),
            digest,
        ),
        "sunspots": _forecast(
            "sunspots: number in 12 months, given 36 months",
            "sunspots",
            *_windows(spots, 36, 12),
            (0, 260),
            digest,
        ),
    }


def _read(path: pathlib.Path) -> tuple[bytes, dict[str, np.ndarray]]:
    text, raw = read_text(path)
    found: dict[str, list[float]] = {}
    values: list[float] = []
    for line in text.splitlines():
        if line.startswith("== "):
            values = found.setdefault(line[3:].split(" |")[0], [])
        elif not line.startswith("#"):
            values.append(_number(line, path))
    for name in ("brent", "sunspots"):
        if len(found.get(name, ())) < 200:
            raise Failure(f"cannot read {path}: `{name}` must have 200 values or more.")
    return raw, {name: np.array(values) for name, values in found.items()}


def _number(line: str, path: pathlib.Path) -> float:
    try:
        value = float(line)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Failure(f"cannot read {path}: {line!r} is not a number.")
    return value


def _windows(x: np.ndarray, past: int, ahead: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.lib.stride_tricks.sliding_window_view(x, past)[:-ahead]
    return rows, x[past + ahead - 1 :]


def _forecast(title, unit, past, target, limits, digest) -> Forecast:
    train = int(0.7 * len(past))
    middle, scale = np.mean(limits), (limits[1] - limits[0]) / 2
    mean, spread = past[:train].mean(), past[:train].std()
    return Forecast(
        title,
        unit,
        float(scale),
        float(middle),
        ((past - mean) / spread).astype(np.float32),
        np.clip((target - middle) / scale, -1, 1),
        float((abs(target - middle) > scale).mean()),
        train,
        digest,
    )
