"""A whole run in order: text, one model for each attention, long sequences, report."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from language_model.training import Stop
from study import output, training
from study.session import stoppable

from . import aligned, model as model_, report, text
from .options import IDENTITY, Options


@stoppable
def run(options: Options, stop: Stop) -> None:
    """Trains (or resumes, or finds complete) the run in `options.out` and reports."""
    corpus = text.load(options)
    batches = text.Batches(corpus.train, options.batch, options.length, options.seed)
    longest = options.length * options.factor
    test = jnp.asarray(
        text.long_sequences(corpus.held_out, options.test_sequences, longest)
    )
    print(
        f"text     {len(corpus.train):,} characters to train on, {test[:, 1:].size:,} "
        f"of {len(corpus.held_out):,} held-out ones in {len(test)} sequences of "
        f"{longest:,}"
    )
    identity = {name: getattr(options, name) for name in IDENTITY}
    identity["corpus"] = corpus.digest[:16]
    results: dict[str, Any] = {}
    for attention in options.attentions:
        model = model_.build(attention, options)
        history = training.train(
            model,
            _plan(attention, options, batches, test[:, : options.length + 1]),
            folder=options.out / "checkpoints",
            identity=identity,
            stop=stop,
        )
        losses = np.asarray(model_.losses_by_position(model, test), float)
        results[attention] = _result(losses, history, options)
        if attention == "softmax":
            losses = np.asarray(
                model_.losses_by_position(model, test, window=options.length), float
            )
            results["window"] = _result(losses, [], options)
        print(f"trained  {_line(attention, results[attention], options)}", flush=True)
    sharpness = {
        attention: [
            aligned.measure(attention, keys, options.seed)._asdict()
            for keys in options.aligned_lengths
        ]
        for attention in options.attentions
    }
    output.write_json(
        options.out / "metrics.json",
        {
            "settings": dataclasses.asdict(options),
            "results": results,
            "aligned": sharpness,
        },
    )
    report.draw(options.out / "report.png", results, sharpness, options)
    _print_summary(results, sharpness, options)
    print(f"picture  {options.out / 'report.png'}")


def _plan(
    attention: str, options: Options, batches: text.Batches, held_out: Any
) -> training.Plan:
    return training.Plan(
        name=attention,
        steps=options.steps,
        batch_at=batches.at,
        loss=model_.mean_loss,
        evaluate=lambda model: float(model_.losses_by_position(model, held_out).mean()),
        evaluate_every=options.evaluate_every,
        learning_rate=options.learning_rate,
    )


def buckets(options: Options) -> list[tuple[int, int]]:
    """Positions up to the training length, then (n, 2 n] up to the longest."""
    longest = options.length * options.factor
    ends = [options.length * 2**i for i in range(longest // options.length)]
    ends = [n for n in ends if n < longest]
    return list(itertools.pairwise([0, *ends, longest]))


def _result(losses: np.ndarray, history: list, options: Options) -> dict[str, Any]:
    """Nats a character by position, by bucket and for whole sequences."""
    bucket = [losses[:, a:b].mean(1) for a, b in buckets(options)]
    return {
        "by_position": losses.mean(0).tolist(),
        "by_bucket": [float(b.mean()) for b in bucket],
        # Sequences are the independent unit: characters of one are not.
        "standard_error": [float(b.std() / len(b) ** 0.5) for b in bucket],
        "by_length": [float(losses[:, :b].mean()) for _, b in buckets(options)],
        "history": history,
    }


def _line(name: str, result: dict[str, Any], options: Options) -> str:
    values = " ".join(f"{v:6.3f}" for v in result["by_bucket"])
    return f"{report.LABEL[name].format(options.length):22} {values}"


def _print_summary(
    results: dict[str, Any], sharpness: dict[str, Any], options: Options
) -> None:
    print("\nWhat this run showed")
    ends = " ".join(f"{f'-{b}':>6}" for _, b in buckets(options))
    print(f"loss     nats a character at positions   {ends}")
    for name, result in results.items():
        print(f"         {_line(name, result, options)}")
    within = {k: r["by_bucket"][0] for k, r in results.items() if k != "window"}
    far = {k: r["by_bucket"][-1] for k, r in results.items()}
    window = far.pop("window")
    best = min(far, key=lambda k: far[k])
    print(
        f"far      at {options.factor} times the training length {best} is best, "
        f"{far[best]:.2f}; softmax is {far['softmax']:.2f}. Within the training "
        f"length {min(within, key=lambda k: within[k])} is best."
    )
    print(
        f"limits   softmax that sees only the last {options.length} keys has "
        f"{window:.2f} there: "
        + (
            "no attention here gains from the longer context, the best only loses less."
            if window <= far[best]
            else f"{best} gains {window - far[best]:.2f} from the longer context."
        )
    )
    print(
        "         One seed, small models, minutes of training: orders of curves that "
        "are\n         closer than the seeds (README) mean nothing."
    )
    few, many = options.aligned_lengths[0], options.aligned_lengths[-1]
    for name, found in sharpness.items():
        print(
            f"aligned  {name:9} weight on the one key that matches: "
            f"{found[0]['weight']:.2f} of {few} keys, {found[-1]['weight']:.3f} of "
            f"{many:,}"
        )
