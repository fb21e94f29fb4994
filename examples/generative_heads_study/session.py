"""A whole run in order: drawn examples in more and more dimensions, then digits."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from study import output, results
from study.intervals import Interval, of_seeds
from study.packed_text import read_text

from . import heads, laws, report
from .options import Options

MARGIN = 0.05  # above the Bayes error
TESTED = 797  # digits that no head sees
PADDED = (64, 512)  # few programs for many numbers of examples
HEADS: dict[str, Callable[..., Any]] = {
    "naive Bayes": heads.naive_bayes,
    "logistic regression, penalty 0.001": functools.partial(heads.logistic, l2=1e-3),
    "logistic regression, penalty 1": functools.partial(heads.logistic, l2=1.0),
}


def run(options: Options) -> None:
    """Prints how many examples each head needs; leaves numbers and a picture."""
    watch = results.Watch()
    output.make_folder(options.out)
    findings: dict[str, Any] = {"laws": {}, "digits": digits(options)}
    for name, law in laws.LAWS.items():
        findings["laws"][name] = {
            head: growth(law, fit, options, name, head) for head, fit in HEADS.items()
        }
    results.record(options.out, options, findings, watch)
    picture = options.out / "report.png"
    report.draw(picture, findings)
    print(f"see {picture}")


def growth(
    law_of: Callable[[int], laws.Law],
    fit: Callable[..., Any],
    options: Options,
    law_name: str,
    head: str,
) -> dict[str, Any]:
    """Examples needed by dimension, and the exponent of their growth."""
    sizes = (n for e in range(1, 20) for n in (2**e, 3 * 2 ** (e - 1)))
    counts = np.array([n for n in sizes if 4 <= n <= options.most])
    logs, start = [], 0
    for dimension in options.dimensions:
        law = law_of(dimension)
        needed = np.full(options.repeats, np.nan)
        goal = law.bayes_error() + MARGIN
        first = None
        for i in range(start, len(counts)):
            n = int(counts[i])
            rng = np.random.default_rng([options.seed, dimension, n])
            x, labels = law.draw(rng, options.repeats, max(n, PADDED[n > PADDED[0]]))
            where = np.broadcast_to(np.arange(labels.shape[1]) < n, labels.shape)
            found = fit(x, labels, where)
            error = law.error(np.asarray(found[0], float), np.asarray(found[1], float))
            reached = np.isnan(needed) & (error < goal)
            needed[reached] = n
            if reached.any() and first is None:
                first = i
            if not np.isnan(needed).any():
                break
        # What was not reached counts as the most that was tried.
        logs.append(np.log(np.where(np.isnan(needed), counts[-1], needed)))
        # More dimensions may need fewer examples, but not by far.
        start = max(0, (len(counts) - 1 if first is None else first) - 6)
        print(f"{law_name}, {head}, {dimension}: {np.exp(np.mean(logs[-1])):.0f}")
    exponents = np.polyfit(np.log(options.dimensions), np.array(logs), 1)[0]
    needs = [of_seeds(each) for each in logs]
    return {
        "needed": [[float(np.exp(each.value)), *ends(each)] for each in needs],
        "exponent": of_seeds(exponents),
    }


def ends(interval: Interval) -> list[float]:
    return [float(np.exp(end)) for end in (interval.low, interval.high)]


def digits(options: Options) -> dict[str, Any]:
    """Error of each head by the number of digits, with intervals over divisions."""
    x, labels = read_digits(options.digits)
    found: dict[str, list[list[float]]] = {}
    for repeat in range(options.digit_repeats):
        rng = np.random.default_rng([options.seed, repeat])
        order = rng.permutation(len(labels))
        given = x[order], labels[order]
        rows: dict[str, list[float]] = {}
        for size in options.sizes:
            for name, error in heads.digit_errors(*given, size, TESTED).items():
                rows.setdefault(name, []).append(error)
        for name, errors in rows.items():
            found.setdefault(name, []).append(errors)
    arrays = {name: np.array(errors) for name, errors in found.items()}
    least = np.minimum(*(arrays[name] for name in heads.GENERATIVE))
    summary = {
        name: [of_seeds(column) for column in errors.T]
        for name, errors in arrays.items()
    }
    # On the same division, so that what is hard about it cancels.
    summary["difference"] = [
        of_seeds(column) for column in (arrays[heads.DISCRIMINATIVE] - least).T
    ]
    for name, numbers in summary.items():
        print(f"digits, {name}: {', '.join(map(str, numbers))}")
    return summary


def read_digits(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 64) from 0 to 16, and the digits."""
    text, _ = read_text(path)
    table = np.array([line.split(",") for line in text.splitlines()], np.float32)
    return table[:, :-1], table[:, -1].astype(np.int32)
