"""A whole run in order: texts, the calls that drafts save, seconds, the law."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from smollm2 import answers
from smollm2.checkpoints import Pretrained
from smollm2.session import load
from study import intervals, output, results

from softlib.decoding import Draft, NGramDraft, PromptLookup

from . import generation, law, replay, report, texts
from .options import Options
from .texts import FREE, Texts

LOOKUP, COUNTED, NONE = "prompt lookup", "counted text", "no draft"


def run(options: Options) -> None:
    """Prints what drafts save; leaves numbers and a picture."""
    watch = results.Watch()
    output.make_folder(options.out)
    pretrained = load(options.weights)
    given = texts.load(pretrained, options)
    written = {
        kind: greedy(pretrained, prompts, options)
        for kind, prompts in given.prompts.items()
    }
    drafts: dict[str, Draft] = {
        LOOKUP: PromptLookup(draft_length=options.draft),
        COUNTED: NGramDraft.fit(
            texts.shuffled(given.counted, options.seed)[: max(options.counted)],
            order=options.order,
            draft_length=options.draft,
        ),
    }
    findings: dict[str, Any] = {
        "calls": saved(given, written, drafts, pretrained.model.config.vocabulary_size),
        "seconds": timed(pretrained, given, written, drafts, options),
        "law": law.measured(
            given.counted,
            [
                [*prompt, *row]
                for prompt, row in zip(given.prompts[FREE], written[FREE], strict=True)
            ],
            options.passage,
            options,
        ),
    }
    results.record(options.out, options, findings, watch)
    picture = options.out / "report.png"
    report.draw(picture, findings, options.counted)
    _print_summary(findings)
    print(f"see {picture}")


def greedy(
    pretrained: Pretrained, prompts: list[list[int]], options: Options
) -> np.ndarray:
    """What the model writes after each prompt, (N, answer), a batch at a time."""
    widest = max(map(len, prompts))
    found = []
    for start in tqdm.trange(0, len(prompts), options.batch, disable=None):
        some = prompts[start : start + options.batch]
        # The last batch is filled up, so that all share a program.
        full = some + prompts[:1] * (options.batch - len(some))
        generated = answers.write(
            pretrained,
            full,
            max_length=options.answer,
            cache_size=widest + options.answer + 16,
            stop=(),
        )
        found.append(np.asarray(generated.tokens)[: len(some)])
    return np.concatenate(found)


def saved(
    given: Texts,
    written: dict[str, np.ndarray],
    drafts: dict[str, Draft],
    vocabulary: int,
) -> dict[str, Any]:
    """Tokens of a call of the model, of each kind of text and draft."""
    found: dict[str, Any] = {}
    for kind, prompts in given.prompts.items():
        found[kind] = {}
        for name, draft in drafts.items():
            calls = replay.calls(prompts, written[kind], draft, vocabulary)
            tokens = np.full(len(prompts), written[kind].shape[1] - 1)
            found[kind][name] = {
                "tokens_per_call": _ratio(tokens, calls.steps),
                "accepted": _ratio(calls.accepted, calls.drafted),
                "drafted_per_call": _ratio(calls.drafted, calls.steps),
            }
    return found


def timed(
    pretrained: Pretrained,
    given: Texts,
    written: dict[str, np.ndarray],
    drafts: dict[str, Draft],
    options: Options,
) -> dict[str, Any]:
    """Seconds without a draft by those with it, one prompt after the other.

    Each prompt is written in all ways in turn, so that what else the machine does falls
    on all of them.
    """
    longest = max(len(p) for prompts in given.prompts.values() for p in prompts)
    width = -(-longest // 16) * 16
    room = width + options.answer + options.draft + 1
    decoders = generation.decoders(pretrained, answer=options.answer, room=room)
    found: dict[str, Any] = {}
    for kind, prompts in given.prompts.items():
        seconds: dict[str, list[float]] = {name: [] for name in (NONE, *drafts)}
        same: dict[str, list[bool]] = {name: [] for name in drafts}
        for number in range(options.timed):
            tokens, lengths = answers.padded(
                prompts[number : number + 1],
                vocabulary=pretrained.model.config.vocabulary_size,
                multiple=width,
            )
            prompt = jax.block_until_ready(
                decoders.read(jnp.asarray(tokens), jnp.asarray(lengths))
            )
            ways: dict[str, Callable[[], Any]] = {
                NONE: lambda prompt=prompt: decoders.plain(prompt),
                **{
                    name: lambda draft=draft, prompt=prompt: (
                        decoders.drafted(prompt, draft).generated
                    )
                    for name, draft in drafts.items()
                },
            }
            for name, way in ways.items():
                generated, took = _clocked(way, warm=number == 0)
                seconds[name].append(took)
                if name in same:
                    tokens = np.asarray(generated.tokens)[0]
                    same[name].append(bool((tokens == written[kind][number]).all()))
        found[kind] = {
            name: {
                "faster": _ratio(np.array(seconds[NONE]), np.array(seconds[name])),
                "same": float(np.mean(same[name])),
            }
            for name in drafts
        }
        found[kind][NONE] = {
            "tokens_per_second": options.answer / float(np.mean(seconds[NONE]))
        }
    return found


def _clocked(way: Callable[[], Any], *, warm: bool) -> tuple[Any, float]:
    if warm:  # compiles
        jax.block_until_ready(way())
    start = time.perf_counter()
    found = jax.block_until_ready(way())
    return found, time.perf_counter() - start


def _ratio(above: np.ndarray, below: np.ndarray) -> intervals.Interval:
    """Of the sums over texts; 0 of nothing is 0."""
    return intervals.bootstrap(
        above, below, statistic=lambda a, b: a.sum() / b.sum() if b.sum() else 0.0
    )


def _print_summary(findings: dict[str, Any]) -> None:
    for kind, rows in findings["calls"].items():
        for name, row in rows.items():
            clock = findings["seconds"][kind][name]
            print(
                f"{kind:15} {name:14} tokens per call {row['tokens_per_call']}, "
                f"accepted {row['accepted']}, faster {clock['faster']} times, "
                f"same text {clock['same']:.0%}"
            )
    for order, row in findings["law"].items():
        print(f"order {order}: {row['slope']} for each tenfold, R^2 {row['r_squared']}")
