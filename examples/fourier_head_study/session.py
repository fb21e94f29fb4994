"""A whole run in order: train each head on each series, compare, draw."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from language_model.training import Stop
from study import output, training
from study.session import stoppable

from . import model as model_, report, series as series_
from .options import IDENTITY, Options


class Result(NamedTuple):
    """One kind of head on one series, over the seeds.

    Attributes:
        series: Its name.
        frequencies: None for a linear layer.
        parameters: Of the head.
        likelihood: Held-out negative log-likelihood per seed, in nats.
        lowest: The least of it at any evaluation, as if training had stopped there.
        fit: The same on what was trained on.
        roughness: Mean `smoothness_metric` of the held-out forecasts, per seed.
        forecasts: (windows, bins) of the first seed.
    """

    series: str
    frequencies: int | None
    parameters: int
    likelihood: list[float]
    lowest: list[float]
    fit: list[float]
    roughness: list[float]
    forecasts: np.ndarray


@stoppable
def run(options: Options, stop: Stop) -> None:
    """Trains (or resumes, or finds complete) the run in `options.out` and reports."""
    data = {n: f for n, f in series_.load(options.data).items() if n in options.series}
    results: list[Result] = []
    for name, forecast in data.items():
        print(
            f"series   {forecast.title}; {len(forecast.target):,} windows, "
            f"{forecast.outside:.2%} of the targets outside of the bins"
        )
        for frequencies in (None, *options.frequencies):
            results.append(_train(name, forecast, frequencies, options, stop))
    baselines = {name: unigram(f, options.bins) for name, f in data.items()}
    output.write_json(
        options.out / "metrics.json",
        {
            "settings": dataclasses.asdict(options),
            "unigram": baselines,
            "results": [
                {k: v for k, v in r._asdict().items() if k != "forecasts"}
                for r in results
            ],
        },
    )
    report.draw(options.out / "report.png", data, results, baselines, options)
    _print_summary(results, baselines, options)
    print(f"credit   {series_.CREDIT}")
    print(f"picture  {options.out / 'report.png'}")


def _train(
    name: str,
    forecast: series_.Forecast,
    frequencies: int | None,
    options: Options,
    stop: Stop,
) -> Result:
    labels = forecast.labels(options.bins)
    old, new = forecast.part(held_out=False), forecast.part(held_out=True)
    past, later = jnp.asarray(forecast.past[old]), jnp.asarray(forecast.past[new])
    known, unseen = jnp.asarray(labels[old]), jnp.asarray(labels[new])
    evaluate = nnx.jit(model_.loss)
    result = Result(name, frequencies, 0, [], [], [], [], np.zeros(0))
    kind = "linear" if frequencies is None else f"fourier-{frequencies}"
    for seed in range(options.seeds):
        model = model_.Network(past.shape[1], frequencies, options, rngs=nnx.Rngs(seed))

        def batch_at(step: int, seed: int = seed):
            random = np.random.default_rng([seed, step])
            rows = random.integers(0, len(known), options.batch)
            return past[rows], known[rows]

        plan = training.Plan(
            name=f"{name}-{kind}-{seed}",
            steps=options.steps,
            batch_at=batch_at,
            loss=model_.loss,
            evaluate=lambda model: float(evaluate(model, later, unseen)),
            evaluate_every=options.evaluate_every,
            learning_rate=options.learning_rate,
        )
        identity = {n: getattr(options, n) for n in IDENTITY}
        identity["data"] = forecast.digest[:16]
        folder = options.out / "checkpoints"
        history = training.train(
            model, plan, folder=folder, identity=identity, stop=stop
        )
        p = model_.forecast(model, later)
        result.likelihood.append(float(evaluate(model, later, unseen)))
        held_out = [r["held_out_loss"] for r in history if "held_out_loss" in r]
        result.lowest.append(min(held_out))
        result.fit.append(float(evaluate(model, past, known)))
        result.roughness.append(float(model_.roughness(p)))
        if seed == 0:
            head = nnx.state(model.head, nnx.Param)
            size = sum(leaf.size for leaf in nnx.to_flat_state(head).leaves)
            result = result._replace(parameters=size, forecasts=np.asarray(p))
    print(
        f"trained  {name} {kind:>10}: held-out {np.mean(result.likelihood):.3f} nats, "
        f"roughness {np.mean(result.roughness):.4f}",
        flush=True,
    )
    return result


def unigram(forecast: series_.Forecast, bins: int) -> float:
    """Held-out likelihood of how often each bin came before, and once more."""
    labels = forecast.labels(bins)
    counts = np.bincount(labels[forecast.part(held_out=False)], minlength=bins) + 1
    p = counts / counts.sum()
    return float(-np.log(p[labels[forecast.part(held_out=True)]]).mean())


def best(results: list[Result], series: str) -> Result:
    """The Fourier head of the least held-out loss."""
    own = [r for r in results if r.series == series and r.frequencies is not None]
    return min(own, key=lambda r: np.mean(r.likelihood))


def linear(results: list[Result], series: str) -> Result:
    return next(r for r in results if (r.series, r.frequencies) == (series, None))


def _print_summary(
    results: list[Result], baselines: dict[str, float], options: Options
) -> None:
    for name, baseline in baselines.items():
        plain, few = linear(results, name), best(results, name)
        print(f"{name:8} counts of the bins alone: {baseline:.3f} nats")
        for title, r in (("linear", plain), (f"Fourier {few.frequencies}", few)):
            print(
                f"{'':8} {title:>10}: held-out {np.mean(r.likelihood):.3f}, lowest "
                f"{np.mean(r.lowest):.3f}, in training {np.mean(r.fit):.3f}; roughness "
                f"{np.mean(r.roughness):.4f}; {r.parameters:,} parameters in the head"
            )
    print(
        "limits   one split in time, one small network, "
        f"{options.seeds} seeds; the best number of frequencies was chosen on the "
        "held-out part that it is reported on."
    )
