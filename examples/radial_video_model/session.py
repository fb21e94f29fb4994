"""A whole run in order: clip, dense and radial training, longer clips, cost, report."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from language_model.training import Stop
from study import output, training
from study.session import stoppable

from . import cost, extension, model as model_, report, video
from .options import IDENTITY, Options
from .task import Clips, HeldOut, mean_loss


@stoppable
def run(options: Options, stop: Stop) -> None:
    """Trains (or resumes, or finds complete) the run in `options.out` and reports."""
    patches = video.load(options.video)
    first = options.train_frames
    codec = video.Codec.fit(patches[:first], options.components)
    latents = codec.encode(patches)
    held_out = HeldOut.of(latents[first:], options)
    print(
        f"video    {first} frames to train on, {len(held_out.latents)} held out; "
        f"{options.components} components of a patch keep "
        f"{_kept(codec, patches[first:]):.1%} of what moves there\n"
        f"credit   {video.CREDIT}"
    )

    identity = {name: getattr(options, name) for name in IDENTITY}
    histories: dict[str, list] = {}

    def train(name: str, model: model_.VideoModel) -> model_.VideoModel:
        histories[name] = training.train(
            model,
            _plan(name, options, latents[:first], held_out),
            folder=options.out / "checkpoints",
            identity=identity,
            stop=stop,
        )
        print(f"trained  {_line(name, histories[name])}", flush=True)
        return model

    # The same initial weights and, by the seed, the same clips in the same order.
    initial = model_.build(options)
    models = {
        "radial": train("radial", model_.under(initial, model_.radial(options))),
        "dense": train("dense", initial),
    }
    for name in ("adapters", "control"):
        adapted = extension.with_adapters(models["dense"], options)
        models[name] = train(name, adapted)
    rows, predictions = extension.errors(
        models["dense"],
        models["radial"],
        models["adapters"],
        models["control"],
        held_out,
        options,
    )
    measured = cost.costs(models["dense"], options)
    stop.raise_if_asked("all models are trained, the same command makes the report.")
    pairs = cost.pairs(options)
    output.write_json(
        options.out / "metrics.json",
        {
            "settings": dataclasses.asdict(options),
            "held_out": [row._asdict() for row in rows],
            "cost": [c._asdict() for c in measured],
            "pairs": [p._asdict() for p in pairs],
            "parameters": {
                "adapters": _size(models["adapters"], nnx.LoRAParam),
                "all": _size(models["adapters"], nnx.Param),
            },
            "histories": histories,
        },
    )
    short, long = options.frames, options.frames * options.extension
    adapted = "dense under the radial mask, adapters"
    report.draw(
        options.out / "report.png",
        mask=model_.radial(options),
        pairs=pairs,
        costs=measured,
        histories=histories,
        rows=rows,
        shown=report.images(
            patches[first:],
            held_out.hidden[0],
            {
                title: codec.decode(predictions[name])
                for title, name in (
                    (f"copy, {short} frames", f"copy of the nearest visible {short}"),
                    (f"dense, {short} frames", f"dense {short}"),
                    (f"radial, {short} frames", f"radial {short}"),
                    (f"radial, adapters, {long} frames", f"{adapted} {long}"),
                )
            },
        ),
        options=options,
    )
    _print_summary(rows, measured, models, histories, options)
    print(f"picture  {options.out / 'report.png'}")


def _plan(
    name: str, options: Options, latents: Any, held_out: HeldOut
) -> training.Plan:
    """Trainings differ in what is trained, and on how many frames for how long."""
    short, long = options.frames, options.frames * options.extension
    # As many patches for both kinds of adapters.
    frames, steps = {
        "adapters": (long, options.adapter_steps),
        "control": (short, options.adapter_steps * options.extension),
    }.get(name, (short, options.steps))
    is_adapted = name in ("adapters", "control")

    def evaluate(model: Any) -> float:
        predict = lambda *clip: model_.predict(model, *clip)
        return held_out.error(held_out.predictions(predict, frames))

    return training.Plan(
        name=name,
        steps=steps,
        batch_at=Clips(latents, frames, options).at,
        loss=mean_loss,
        evaluate=evaluate,
        evaluate_every=options.evaluate_every,
        learning_rate=(
            options.adapter_learning_rate if is_adapted else options.learning_rate
        ),
        wrt=nnx.LoRAParam if is_adapted else nnx.Param,
    )


def _kept(codec: video.Codec, patches: Any) -> float:
    lost = ((codec.decode(codec.encode(patches)) - patches) ** 2).mean()
    return float(1 - lost / ((patches - codec.background) ** 2).mean())


def _size(model: nnx.Module, kind: type[nnx.Variable]) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, kind)))


def _line(name: str, history: list) -> str:
    losses = [r["held_out_loss"] for r in history if "held_out_loss" in r]
    return (
        f"{name:9} held-out error {losses[0]:.3f} -> {losses[-1]:.3f} in "
        f"{history[-1]['step']} steps, "
        f"{training.seconds_per_step(history):.2f} s a step"
    )


def _print_summary(
    rows: list[extension.Row],
    costs: list[cost.Cost],
    models: dict[str, model_.VideoModel],
    histories: dict[str, list],
    options: Options,
) -> None:
    print("\nWhat this run showed (errors of hidden held-out patches, 1: background)")
    for row in rows:
        print(f"error    {row.error:.3f}  {row.name}, {row.frames} frames at once")
    error = {f"{r.name} {r.frames}": r.error for r in rows}
    short, long = options.frames, options.frames * options.extension
    copy = error[f"copy of the nearest visible {short}"]
    gap = error[f"radial {short}"] - error[f"dense {short}"]
    print(
        f"quality  radial minus dense {gap:+.3f}; both start from the copy ({copy:.3f})"
    )
    before = error[f"dense under the radial mask, not adapted {long}"]
    after = error[f"dense under the radial mask, adapters {long}"]
    control = error[f"dense under the radial mask, adapters of short clips {long}"]
    adapters = _size(models["adapters"], nnx.LoRAParam)
    every = _size(models["adapters"], nnx.Param)
    print(
        f"longer   {options.extension} times the frames: {before:.3f} before, "
        f"{after:.3f} after training adapters ({adapters:,} of {every:,} parameters)\n"
        f"         on them, {control:.3f} on as many patches of short clips"
    )
    by = {(c.attention, c.tokens): c for c in costs}
    for tokens in sorted({c.tokens for c in costs})[-2:]:
        dense, radial = by["dense", tokens], by["radial", tokens]
        stored = by["stored", tokens].temporary_bytes
        print(
            f"cost     {tokens:6,} tokens: {radial.seconds:.2f} s radial, "
            f"{dense.seconds:.2f} s dense; temporary memory "
            f"{_megabytes(radial.temporary_bytes)} radial, "
            f"{_megabytes(dense.temporary_bytes)} dense, {_megabytes(stored)} with "
            "stored scores"
        )
    slower = [n for a, n in by if a == "radial" and _slower(by, n)]
    if slower:
        print(
            f"limits   At {', '.join(f'{n:,}' for n in slower)} tokens radial was no "
            "faster than dense here:\n         the mask leaves most blocks there, and "
            "those that it cuts cost extra."
        )
    print(
        "limits   One shot of 128 frames, one seed, minutes of training: the models "
        "improve\n         on copying the nearest visible patch, they do not make "
        "sharp motion. An\n         error of 0 would still be an image of "
        f"{options.components} components a patch."
    )
    last = [r["train_loss"] for r in histories["dense"] if "train_loss" in r]
    last = last[-max(1, len(last) // 8) :]
    print(
        f"limits   On clips of the training frames the error of dense is "
        f"{sum(last) / len(last):.2f} at the end, held out\n         "
        f"{error[f'dense {short}']:.2f}: part of what it learned is these "
        f"{options.train_frames} frames."
    )


def _slower(costs: dict[tuple[str, int], cost.Cost], tokens: int) -> bool:
    dense, radial = (costs[name, tokens].seconds for name in ("dense", "radial"))
    return dense is not None and radial is not None and radial > dense


def _megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:,.0f} MB"
