"""A whole run in order: options chosen on some words, choices on others."""

from typing import Any

import jax
import numpy as np
from study import output, results
from study.intervals import bootstrap

from . import choices, dictionary, gru, report
from .choices import Candidates
from .dictionary import Words
from .options import Options

POWERS = (0.0, 0.5, 1.0)
TEMPERATURES = (0.25, 0.5, 1.0, 2.0)
GREEDY, BEAM = "greedy", "beam"


def run(options: Options) -> None:
    """Prints how many words each choice has right; leaves numbers and a picture."""
    watch = results.Watch()
    output.make_folder(options.out)
    p = gru.load(options.weights)
    count = options.words + options.tuning
    words = dictionary.load(options.dictionary, count, options.longest, options.seed)
    part = lambda slice_: Words(*(array[slice_] for array in words))
    tuning, test = part(slice(options.tuning)), part(slice(options.tuning, None))

    settings = tuned(p, tuning, options)
    chosen, found = choose(p, test, settings, options)
    findings: dict[str, Any] = {"settings": settings, "methods": {}}
    # Whether each word is right, and how near what is said is to it.
    scores = {name: (correct(t, test), near(t, test)) for name, t in chosen.items()}
    for name, (right, alike) in scores.items():
        # Differences on the same words, so that what is hard about them cancels.
        numbers = {
            "accuracy": bootstrap(right),
            "similarity": bootstrap(alike),
            "over_greedy": bootstrap(right - scores[GREEDY][0]),
            "over_beam": bootstrap(right - scores[BEAM][0]),
            "nearer_than_beam": bootstrap(alike - scores[BEAM][1]),
        }
        findings["methods"][name] = numbers
        shown = ", ".join(f"{key} {value}" for key, value in numbers.items())
        print(f"{name:22} {shown}")
    findings |= about_candidates(found, test)
    results.record(options.out, options, findings, watch)
    picture = options.out / "report.png"
    report.draw(picture, findings)
    print(f"see {picture}")


def correct(tokens: np.ndarray, words: Words) -> np.ndarray:
    """1 for a word whose sounds (B, L) are those of the dictionary."""
    return (tokens == words.phonemes).all(-1).astype(float)


def near(tokens: np.ndarray, words: Words) -> np.ndarray:
    """One less the edit distance per sound of each word."""
    return choices.similarity(tokens[:, None], words.phonemes[:, None])[:, 0, 0]


def of_beams(p: gru.Parameters, words: Words, options: Options) -> Candidates:
    found = choices.search(
        p, words.letters, words.lengths, options.beams, options.longest
    )
    return choices.candidates(p, words, *map(np.asarray, found[:2]))


def tuned(p: gru.Parameters, words: Words, options: Options) -> dict[str, Any]:
    """The power and temperature of the most words right, the first of equal ones."""
    found = of_beams(p, words, options)
    gain = choices.similarity(found.tokens, found.tokens)
    best = {"accuracy": -1.0}
    for power in POWERS:
        for temperature in TEMPERATURES:
            at = choices.agreed(found, gain, power=power, temperature=temperature)
            accuracy = correct(taken(found.tokens, at), words).mean()
            if accuracy > best["accuracy"]:
                best = {
                    "accuracy": accuracy,
                    "power": power,
                    "temperature": temperature,
                }
    return best


def choose(
    p: gru.Parameters, words: Words, settings: dict[str, Any], options: Options
) -> tuple[dict[str, np.ndarray], Candidates]:
    """What each way of choosing says of each word, (B, L)."""
    greedy = choices.search(p, words.letters, words.lengths, 1, options.longest)
    found = of_beams(p, words, options)
    gain = choices.similarity(found.tokens, found.tokens)
    key = jax.random.key(options.seed)
    drawn = np.asarray(
        choices.sample(
            p, key, words.letters, words.lengths, options.samples, options.longest
        )
    )
    drawn = np.where(drawn == dictionary.END, -1, drawn)
    best = choices.most_probable
    given = {name: settings[name] for name in ("power", "temperature")}
    plain = {"power": 0.0, "temperature": 1.0}
    of_greedy = np.asarray(greedy.tokens[:, 0])
    chosen = {
        GREEDY: np.where(of_greedy == dictionary.END, -1, of_greedy),
        BEAM: taken(found.tokens, best(found.log_probs, found)),
        "beam, mean per sound": taken(found.tokens, best(found.log_probs, found, 1.0)),
        "beam, utility": taken(found.tokens, best(found.utilities, found)),
        "Bayes risk": taken(found.tokens, choices.agreed(found, gain, **plain)),
        "Bayes risk, tuned": taken(found.tokens, choices.agreed(found, gain, **given)),
        "Bayes risk, samples": taken(
            drawn, choices.of_samples(drawn, choices.similarity(drawn, drawn))
        ),
    }
    return chosen, found


def taken(tokens: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.take_along_axis(tokens, at[:, None, None], 1)[:, 0]


def about_candidates(found: Candidates, words: Words) -> dict[str, Any]:
    """What the candidates could give at best, and how long the likeliest are."""
    hit = (found.tokens == words.phonemes[:, None]).all(-1) & found.where
    mass = np.where(found.where, np.exp(found.log_probs), 0).sum(-1)
    length = lambda tokens: (tokens >= 0).sum(-1)
    first = length(found.tokens[:, 0]) - length(words.phonemes)
    return {
        "among_candidates": bootstrap(hit.any(-1)),
        "probability_of_candidates": bootstrap(mass),
        "length_less_truth": bootstrap(first),
        "empty_is_likeliest": bootstrap(length(found.tokens[:, 0]) == 0),
    }
