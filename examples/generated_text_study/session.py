"""A whole run in order: texts, what the model says of them, errors, the picture."""

from typing import Any

from smollm2 import session as smollm2_session
from study import intervals, output, results
from study.results import Watch

from . import errors, reading, report, texts
from .options import Options
from .reading import Reading

SHOWN = 2  # texts of each author that are kept


def run(options: Options) -> None:
    """Writes texts, tests them and reports how often the tests err."""
    watch = Watch()
    output.make_folder(options.out)
    pretrained = smollm2_session.load(options.weights)
    tokens = texts.written(pretrained, options)
    read = {a: reading.read(pretrained, t, options) for a, t in tokens.items()}
    findings = found(read, options)
    findings["examples"] = {
        author: pretrained.tokenizer.decode_batch(some[:SHOWN].tolist())
        for author, some in tokens.items()
    }
    results.record(options.out, options, findings, watch)
    report.draw(options.out / "report.png", findings)
    _print_summary(findings)
    print(f"picture  {options.out / 'report.png'}")


def found(read: dict[str, Reading], options: Options) -> dict[str, Any]:
    """The mean of each author, and the errors against the length."""
    own = read[texts.OWN]
    authors = {
        author: {
            "log_perplexity": intervals.bootstrap(some.surprisal.mean(1)),
            "entropy": intervals.bootstrap(some.entropy.mean(1)),
            "difference": intervals.bootstrap((some.surprisal - some.entropy).mean(1)),
        }
        for author, some in read.items()
    }
    others = {
        author: errors.of_lengths(
            own, read[author], options.lengths, with_ratio=author == texts.SHIFTED
        )
        for author in (texts.HUMAN, texts.SHIFTED)
    }
    lines = {author: errors.lines(rows) for author, rows in others.items()}
    return {"authors": authors, "errors": others, "lines": lines}


def _print_summary(findings: dict[str, Any]) -> None:
    print("table    nats per token: log-perplexity, entropy, their difference")
    for author, row in findings["authors"].items():
        print(f"         {author:20} " + "  ".join(f"{v!s:22}" for v in row.values()))
    for author, rows in findings["errors"].items():
        print(f"errors   own texts against those of {author}")
        for row in rows:
            print(
                f"         {row['test']:10} {row['error']:7} {row['length']:5} tokens  "
                f"{row['rate']}"
            )
        for line in findings["lines"][author]:
            print(
                f"line     {line['test']} {line['error']}: {line['slope']:.4f} per "
                f"token, R^2 {line['r_squared']:.3f} of {line['points']} points"
            )
