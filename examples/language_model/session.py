"""A whole run in order: data, model, training, sample, comparison, memory, report."""

import contextlib
import dataclasses
import math
import textwrap

import jax
import numpy as np
from flax import nnx

from . import corpus as corpus_, memory, report, training
from .checkpoints import Checkpoints, Progress, delete_run
from .failures import Failure, reason
from .options import IDENTITY, Options
from .sampling import generate


def run(options: Options) -> None:
    """Trains (or resumes, or finds complete) the run in `options.out` and reports."""
    with training.stop_signals() as stop:
        _run(options, stop)


def _run(options: Options, stop: training.Stop) -> None:
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot use --out {options.out}: {reason(error)}.") from error
    if options.fresh:
        delete_run(options.out)

    corpus = corpus_.load(options)
    batches = corpus_.Batches(
        corpus.train, options.batch, options.context, options.seed
    )
    held_out = corpus_.held_out_windows(corpus, options)
    print(
        f"corpus   {len(corpus.train):,} training tokens "
        f"({_span(options.train_years)}), {held_out[:, 1:].size:,} of "
        f"{len(corpus.held_out):,} held-out tokens ({_span(options.held_out_years)}), "
        f"vocabulary {corpus.vocabulary_size:,}"
    )

    model, optimizer = training.build(options, corpus.vocabulary_size)
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(
        f"model    {parameters / 1e6:.2f} M parameters, {model.table.size / 1e6:.2f} M "
        f"of them the table shared by embedding and head; loss: {options.loss}"
    )
    identity = {name: getattr(options, name) for name in IDENTITY}
    identity["corpus"] = corpus.digest[:16]
    with contextlib.closing(
        Checkpoints(options.out / "checkpoints", identity)
    ) as checkpoints:
        progress = checkpoints.restore(model, optimizer)
        if progress.step == options.steps:
            print(f"resume   {options.out} is complete; --fresh starts anew")
        elif progress.step:
            print(f"resume   {options.out} at step {progress.step} of {options.steps}")
        speed = training.train(
            model,
            optimizer,
            progress,
            options=options,
            batches=batches,
            held_out=held_out,
            checkpoints=checkpoints,
            stop=stop,
            publish=lambda h: report.write_csv(options.out / "metrics.csv", h),
        )
    _finish(options, stop, corpus, batches, held_out, model, progress, speed)


def _finish(
    options: Options,
    stop: training.Stop,
    corpus: corpus_.Corpus,
    batches: corpus_.Batches,
    held_out: np.ndarray,
    model: training.LanguageModel,
    progress: Progress,
    speed: float,
) -> None:
    complete = "training is complete and saved, the same command makes the report."
    sample = generate(
        model,
        corpus.tokenizer,
        prompt=options.prompt,
        tokens=options.sample_tokens,
        temperature=options.temperature,
        context=options.context,
        key=jax.random.key(options.seed),
    )
    stop.raise_if_asked(complete)
    other = "optax" if options.loss == "softlib" else "softlib"
    comparison = training.losses_of_first_steps(
        options,
        corpus.vocabulary_size,
        batches,
        loss=other,
        steps=min(options.compare, options.steps),
        stop=stop,
    )
    own = [r["train_loss"] for r in progress.history if "train_loss" in r]
    measurements = []
    if options.memory_chart:
        measurements = memory.survey(
            rows=options.batch * options.context,
            width=options.width,
            vocabulary=corpus.vocabulary_size,
        )
        stop.raise_if_asked(complete)
    evaluations = [r for r in progress.history if "held_out_loss" in r]
    summary = {
        "held_out_perplexity_before": math.exp(evaluations[0]["held_out_loss"]),
        "held_out_perplexity_after": math.exp(evaluations[-1]["held_out_loss"]),
        "held_out_accuracy_after": evaluations[-1]["held_out_accuracy"],
        "unigram_perplexity": corpus_.unigram_perplexity(corpus, held_out[:, 1:]),
        "tokens_per_second": None if math.isnan(speed) else speed,
        "compared_steps": len(comparison),
        "largest_difference_of_losses": max(
            (abs(a - b) for a, b in zip(own, comparison, strict=False)), default=None
        ),
        "sample": options.prompt + sample,
        "memory": [m._asdict() for m in measurements],
    }
    report.write_csv(options.out / "metrics.csv", progress.history)
    report.write_json(
        options.out / "metrics.json",
        progress.history,
        settings=dataclasses.asdict(options),
        summary=summary,
    )
    picture = options.out / "report.png"
    report.draw(
        picture,
        progress.history,
        loss=options.loss,
        unigram_perplexity=summary["unigram_perplexity"],
        comparison=comparison,
        memory=measurements,
        title=f"State of the Union, vocabulary {corpus.vocabulary_size:,}: trained on "
        f"{_span(options.train_years)}, held out {_span(options.held_out_years)}",
    )
    _print_summary(options, corpus.vocabulary_size, summary, other, measurements)
    print(f"picture  {picture}")


def _print_summary(options, vocabulary_size, summary, other, measurements) -> None:
    print("\nWhat this run showed")
    print(
        f"learning held-out perplexity {summary['held_out_perplexity_before']:,.0f} -> "
        f"{summary['held_out_perplexity_after']:,.0f} in {options.steps} steps "
        f"(unigram {summary['unigram_perplexity']:,.0f}, uniform guess "
        f"{vocabulary_size:,}); top-1 {summary['held_out_accuracy_after']:.1%}"
    )
    if summary["tokens_per_second"]:
        print(f"speed    {summary['tokens_per_second']:,.0f} tokens/s in training")
    if summary["compared_steps"]:
        print(
            f"equal    {options.loss} and {other} losses of the first "
            f"{summary['compared_steps']} steps differ by at most "
            f"{summary['largest_difference_of_losses']:.1e} nats"
        )
    for m in measurements[:1] + measurements[-1:]:  # the run's own rows, and many
        ours, stored = m.temporary_bytes["softlib"], m.temporary_bytes["optax"]
        if ours and stored:
            print(
                f"memory   loss and gradients of {m.rows:,} rows of {m.width} over "
                f"{m.vocabulary:,} classes: softlib {ours / 1e6:,.1f} MB, optax "
                f"{stored / 1e6:,.0f} MB, {stored / ours:,.0f} times as much"
            )
    if options.sample_tokens:
        words = " ".join(summary["sample"].split())
        print(
            textwrap.fill(
                words, 88, initial_indent="sample   ", subsequent_indent=" " * 9
            )
        )


def _span(years: tuple[int, int]) -> str:
    return f"{years[0]}-{years[1]}"
