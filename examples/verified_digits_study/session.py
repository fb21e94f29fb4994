"""A whole run in order: networks, rules, and what each accepts of each condition."""

from typing import Any

import numpy as np
from study import output, results
from study.intervals import of_seeds

from . import digits, network, report, rules
from .options import Options


def run(options: Options) -> None:
    """Prints what each rule accepts and how much of it is right; leaves a picture."""
    watch = results.Watch()
    output.make_folder(options.out)
    accepted: dict[str, dict[str, list[np.ndarray]]] = {}
    plain: dict[str, list[float]] = {name: [] for name in digits.CONDITIONS}
    for seed in range(options.seed, options.seed + options.seeds):
        usual = digits.CONDITIONS["as in training"]
        train = digits.draw(options.train, usual, (seed, 0))
        calibration = digits.draw(options.calibration, usual, (seed, 1))
        found = network.fit(train, calibration, options, seed)
        of_rules = rules.fit(found, options.percent / 100)
        for part, (name, condition) in enumerate(digits.CONDITIONS.items(), 2):
            images = digits.draw(options.test, condition, (seed, part))
            seen = found.see(images)
            right = np.asarray(seen.logits.argmax(-1)) == images.labels
            plain[name].append(float(right.mean()))
            for rule, accepts in of_rules.items():
                taken = accepts(seen)
                counts = np.array([taken.sum(), (taken & right).sum(), len(taken)])
                accepted.setdefault(rule, {}).setdefault(name, []).append(counts)
        print(f"network {seed}: {plain['as in training'][-1]:.1%} of digits right")
    findings: dict[str, Any] = {
        "accuracy": {name: of_seeds(np.array(all_)) for name, all_ in plain.items()},
        "rules": {
            rule: {name: summary(np.array(each)) for name, each in of_rule.items()}
            for rule, of_rule in accepted.items()
        },
    }
    for rule, of_rule in findings["rules"].items():
        print(rule)
        for name, numbers in of_rule.items():
            shown = ", ".join(f"{key} {value}" for key, value in numbers.items())
            print(f"    {name:18} {shown}")
    results.record(options.out, options, findings, watch)
    picture = options.out / "report.png"
    report.draw(picture, findings, options.percent / 100)
    print(f"see {picture}")


def summary(counts: np.ndarray) -> dict[str, Any]:
    """Of rows (accepted, right among them, all), one a network.

    The accuracy is the mean over networks that accept anything; `networks` says how
    many these are.
    """
    taken, right, count = counts.T
    some = taken > 0
    return {
        "accepted": of_seeds(taken / count),
        "right": of_seeds(right[some] / taken[some]) if some.any() else None,
        "wrong": of_seeds((taken - right) / count),
        "networks": int(some.sum()),
    }
