"""A whole run in order: every training, the table, the picture."""

import dataclasses

from language_model.checkpoints import Record
from language_model.training import Stop
from study import output
from study.session import stoppable

from . import report, training
from .options import Options

GENERALISED = 0.99


@stoppable
def run(options: Options, stop: Stop) -> None:
    """Trains (or resumes, or finds complete) the run in `options.out` and reports."""
    curves: dict[training.Plan, list[Record]] = {}
    for plan in training.plans(options):
        curves[plan] = training.train(
            plan, options, folder=options.out / "checkpoints", stop=stop
        )
        print(f"trained  {_line(plan, curves[plan])}", flush=True)
    output.write_json(
        options.out / "metrics.json",
        {
            "settings": dataclasses.asdict(options),
            "results": [
                {**plan._asdict(), "curve": curve} for plan, curve in curves.items()
            ],
        },
    )
    of = lambda modulus: {
        plan.method: curve for plan, curve in curves.items() if plan.modulus == modulus
    }
    large, small = of(options.modulus), of(options.small_modulus)
    report.draw(options.out / "report.png", large, small, options)
    _print_summary(curves)
    print(f"picture  {options.out / 'report.png'}")


def _line(plan: training.Plan, curve: list[Record]) -> str:
    seconds = sum(record.get("seconds", 0) for record in curve)
    return (
        f"{report.LABEL[plan.method]}, modulo {plan.modulus}: "
        f"{curve[-1]['test_accuracy']:.1%} of the held-out sums right after "
        f"{plan.epochs:,} epochs, {seconds:.0f} s"
    )


def _print_summary(curves: dict[training.Plan, list[Record]]) -> None:
    print("\nWhat this run showed (the last epoch of each)")
    print(
        "table    modulo  method                    epochs   train    test   best "
        "collapsed  losses 0   cosine"
    )
    for plan, curve in curves.items():
        end = curve[-1]
        best = max(record["test_accuracy"] for record in curve)
        print(
            f"         {plan.modulus:6}  {report.LABEL[plan.method]:24} "
            f"{plan.epochs:7,} {end['train_accuracy']:7.1%} "
            f"{end['test_accuracy']:7.1%} {best:6.1%} {end['collapse_fraction']:9.1%} "
            f"{end['zero_loss_fraction']:9.1%} {end['alignment']:8.2f}"
        )
    for plan, curve in curves.items():
        if sentence := _sentence(plan, curve):
            name = f"{report.LABEL[plan.method]}, modulo {plan.modulus}"
            print(f"epochs   {name}: {sentence}")
    print(
        "limits   One seed, one network without biases, full batches. The cosine is "
        "that of\n         -gradient and weight, the mean of the matrices."
    )


def _sentence(plan: training.Plan, curve: list[Record]) -> str | None:
    learned = report.first_epoch(curve, "test_accuracy", GENERALISED)
    zeros = report.first_epoch(curve, "zero_loss_fraction", 0.5)
    said = []
    if learned is not None:
        said.append(f"{GENERALISED:.0%} of the held-out sums at epoch {learned:,}")
    if zeros is not None:
        said.append(f"half of the losses are exactly 0 at epoch {zeros:,}")
    return ", ".join(said) + "." if said else None
