"""A whole run in order: the hand-set head, training, maps, cost, report."""

import dataclasses
from typing import Any

from language_model.training import Stop
from study import output, training
from study.session import stoppable

from . import cost, hand_set, maps, model as model_, report
from .options import IDENTITY, Options
from .task import Sequences, mean_loss


@stoppable
def run(options: Options, stop: Stop) -> None:
    """Trains (or resumes, or finds complete) the run in `options.out` and reports."""
    by_hand = [
        hand_set.measure(dtype, n, options)
        for dtype in hand_set.DTYPES
        for n in options.hand_set_lengths
    ]
    for scores in by_hand:
        print(f"by hand  {_hand_set_line(scores)}", flush=True)
    identity = {name: getattr(options, name) for name in IDENTITY}
    results: dict[str, dict[str, Any]] = {name: {} for name in options.attentions}
    models = {}
    for seed in options.seeds:
        for name in options.attentions:
            model = model_.build(name, options, seed)
            history = training.train(
                model,
                _plan(name, options, seed),
                folder=options.out / "checkpoints",
                identity=identity,
                stop=stop,
            )
            results[name][str(seed)] = _result(history, model)
            models.setdefault(name, model)  # of the first seed
            print(f"trained  {_line(name, seed, history)}", flush=True)
    majority = {str(s): _majority(s, options) for s in options.seeds}
    sequences = Sequences(options.length, options.modulus, options.seeds[0])
    attended = maps.attended(models["tensor"], sequences, options)
    measured = cost.costs(options)
    stop.raise_if_asked("all models are trained, the same command makes the report.")
    output.write_json(
        options.out / "metrics.json",
        {
            "settings": dataclasses.asdict(options),
            "hand_set": [scores._asdict() for scores in by_hand],
            "majority": majority,
            "results": results,
            "attended": {
                "on_matches": attended.on_matches,
                "by_chance": attended.by_chance,
                "found": attended.found,
                "by_sum": attended.by_sum.tolist(),
            },
            "cost": [c._asdict() for c in measured],
        },
    )
    report.draw(
        options.out / "report.png",
        by_hand=by_hand,
        results=results,
        majority=majority,
        attended=attended,
        costs=measured,
        options=options,
    )
    _print_summary(by_hand, results, majority, attended, measured, options)
    print(f"picture  {options.out / 'report.png'}")


def _plan(name: str, options: Options, seed: int) -> training.Plan:
    sequences = Sequences(options.length, options.modulus, seed)
    fresh = sequences.fresh(options.test_sequences)
    return training.Plan(
        name=f"{name}-{seed}",
        steps=options.steps,
        batch_at=lambda step: sequences.at(step, options.batch),
        loss=mean_loss,
        evaluate=lambda model: model_.errors(model, *fresh),
        evaluate_every=options.evaluate_every,
        learning_rate=options.learning_rate,
    )


def _result(history: list, model: Any) -> dict[str, Any]:
    """The curve is of fresh sequences, the loss the mean between its points."""
    steps = [r["step"] for r in history if "held_out_loss" in r]
    return {
        "parameters": model_.parameters(model),
        "steps": steps,
        "accuracy": [1 - r["held_out_loss"] for r in history if "held_out_loss" in r],
        "seconds_per_step": training.seconds_per_step(history),
    }


def _majority(seed: int, options: Options) -> float:
    """Accuracy of always giving the more frequent answer."""
    sequences = Sequences(options.length, options.modulus, seed)
    share = float(sequences.fresh(options.test_sequences)[1].mean())
    return max(share, 1 - share)


def _line(name: str, seed: int, history: list) -> str:
    wrong = [r["held_out_loss"] for r in history if "held_out_loss" in r]
    return (
        f"{report.LABEL[name]}, seed {seed}: {1 - wrong[-1]:.2%} of the answers right "
        f"in {history[-1]['step']:,} steps, "
        f"{1e3 * training.seconds_per_step(history):.1f} ms a step"
    )


def _hand_set_line(scores: hand_set.Scores) -> str:
    return (
        f"{scores.dtype}, n = {scores.length:3}, M = {scores.length**2:6,}: "
        f"{scores.false_positives + scores.false_negatives:3} wrong of "
        f"{scores.answers:,} ({scores.positive:.0%} are 1); score "
        f"{scores.least_match:.4f} or more with a triple, {scores.most_other:.4f} or "
        "less without"
    )


def _print_summary(
    by_hand: list[hand_set.Scores],
    results: dict[str, dict[str, Any]],
    majority: dict[str, float],
    attended: maps.Attended,
    costs: list[cost.Cost],
    options: Options,
) -> None:
    print("\nWhat this run showed")
    for dtype in hand_set.DTYPES:
        found = [s for s in by_hand if s.dtype == dtype]
        print(
            f"by hand  one head of width 5, not trained, {report.wrong(dtype, found)}"
        )
    seeds = [str(seed) for seed in options.seeds]
    head = " ".join(f"{f'seed {seed}':>8}" for seed in seeds)
    print(
        f"trained  n = {options.length}, M = {options.modulus}, {options.steps:,} "
        f"steps; share of right answers to fresh sequences\n"
        f"         {'':20} {head}  parameters  ms a step"
    )
    for name in options.attentions:
        found = [results[name][seed] for seed in seeds]
        values = " ".join(f"{r['accuracy'][-1]:8.2%}" for r in found)
        fastest = 1e3 * min(r["seconds_per_step"] for r in found)
        print(
            f"         {report.LABEL[name]:20} {values}  "
            f"{found[0]['parameters']:10,}  {fastest:9.1f}"
        )
    values = " ".join(f"{majority[seed]:8.2%}" for seed in seeds)
    print(f"         {'more frequent answer':20} {values}")
    print(
        f"maps     heads of seed {seeds[0]} attend to triples that sum to zero "
        f"{', '.join(f'{x:.1f}' for x in attended.by_sum[:, 0])} times as much as\n"
        f"         their number makes; where there are some, one head has more than "
        f"half of its\n         weight on them in {attended.found:.0%} of the queries"
    )
    _print_costs(costs)
    print(
        "limits   A task made for tensor attention: this shows what one layer can "
        "express, not that\n         other data need it. Exact tensor attention takes "
        "a time cubic in the length."
    )
    if "deeper" in results:
        best = max(r["accuracy"][-1] for r in results["deeper"].values())
        print(
            f"limits   Two layers of pairwise attention come nearer, {best:.0%} at "
            "best here, with more\n         parameters."
        )


def _print_costs(costs: list[cost.Cost]) -> None:
    longest = max(c.tokens for c in costs)
    exact = {c.tokens: c.seconds for c in costs if c.rtol is None}
    print(
        f"cost     {longest:,} tokens, {cost.FEATURES} features, entries up to "
        f"{cost.BOUND:g}: {1e6 * exact[longest]:.2f} us a token exact"
    )
    for rtol in cost.TOLERANCES:
        found = [c for c in costs if c.rtol == rtol]
        (last,) = (c for c in found if c.tokens == longest)
        slower = [c.tokens for c in found if c.seconds >= exact[c.tokens]]
        faster = [c.tokens for c in found if c.tokens > max(slower, default=0)]
        print(
            f"         {1e6 * last.seconds:.2f} us with {cost.rank(rtol):3} monomials:"
            f" error {max(c.error or 0 for c in found):.1e}, certified "
            f"{cost.certified(rtol):.1e}; "
            + (f"faster from {min(faster)} tokens on" if faster else "never faster")
            + f" (operations: {cost.crossover(rtol):.0f})"
        )
