"""A whole run in order: questions, answers, what their scores say, the picture."""

from typing import Any

import jax
import numpy as np
import tqdm
from smollm2 import answers, session as smollm2_session
from study import intervals, minilm, output, results, wordnet
from study.results import Watch

from softlib import scoring

from . import questions, report, sampling, scores
from .options import Options
from .questions import Question
from .sampling import Asked
from .scores import Groups

SHOWN = 12  # questions whose answers are kept


def run(options: Options) -> None:
    """Asks all questions and reports which scores tell the wrong answers."""
    watch = Watch()
    output.make_folder(options.out)
    print(wordnet.CREDIT)
    asked_for = questions.draw(options)
    pretrained = smollm2_session.load(options.weights)
    asked = answered(pretrained, asked_for, options)
    texts = lambda tokens: [
        pretrained.tokenizer.decode(row[row >= 0])
        for row in tokens.reshape(-1, tokens.shape[-1])
    ]
    given, sampled = texts(asked.greedy.tokens), texts(asked.samples.tokens)
    right = np.array(list(map(questions.is_right, given, asked_for)))
    groups = grouped(np.reshape(sampled, (len(right), -1)), options)
    findings = found(asked, groups, ~right)
    findings["examples"] = [
        {"word": q.word, "answer": questions.normalized(text), "right": r, "nll": nll}
        for q, text, r, nll in zip(
            asked_for, given, right, asked.greedy.nll, strict=True
        )
    ][:SHOWN]
    results.record(options.out, options, findings, watch)
    report.draw(options.out / "report.png", findings)
    _print_summary(findings)
    print(f"picture  {options.out / 'report.png'}")


def answered(pretrained: Any, asked_for: list[Question], options: Options) -> Asked:
    """Answers to all questions, a batch at a time."""
    texts = [question.text for question in asked_for]
    width = max(map(len, answers.encoded(pretrained, texts)))
    stop = sampling.ends(pretrained)
    key = jax.random.key(options.seed)
    parts = []
    for start in tqdm.trange(0, len(texts), options.batch, desc="asked", disable=None):
        some = texts[start : start + options.batch]
        # The last batch is filled up, so that all share a program.
        full = some + texts[: options.batch - len(some)]
        full += [texts[0]] * (options.batch - len(full))
        found = sampling.ask(
            pretrained,
            questions.SHOWN,
            full,
            jax.random.fold_in(key, start),
            samples=options.samples,
            max_length=options.answer,
            width=width,
            stop=stop,
        )
        parts.append(jax.tree.map(lambda array, n=len(some): array[:n], found))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def grouped(texts: np.ndarray, options: Options) -> Groups:
    """Groups of the samples (B, S) of each question that mean the same."""
    flat = [questions.normalized(text) for text in texts.ravel()]
    each, ids = np.unique(flat, return_inverse=True)
    ids = ids.reshape(texts.shape)
    if not options.similarity:
        return Groups(ids, None)
    print(minilm.CREDIT)
    features = minilm.features([text or "nothing" for text in each])[ids]
    similarity = np.einsum("bsd,btd->bst", features, features)
    similar = jax.vmap(
        lambda one: scoring.similar_groups(one, threshold=options.threshold)
    )
    return Groups(ids, np.asarray(similar(similarity)))


def found(asked: Asked, groups: Groups, wrong: np.ndarray) -> dict[str, Any]:
    """What each score says about the wrong answers, and how that grows with samples."""
    samples = asked.samples.nll.shape[1]
    one = scores.of_one(asked)
    every = one + scores.of_samples(asked, groups, samples)
    counts = [n for n in (1, 2, 3, 5, 7, 10, 15, 20) if n < samples] + [samples]
    curve = [
        {"samples": n, "name": s.name, "area": scores.area_of(wrong, s.values)}
        for n in counts
        for s in scores.of_samples(asked, groups, n)
    ]
    return {
        "accuracy": intervals.bootstrap(~wrong),
        "scores": [
            {
                "name": s.name,
                "sequences": s.sequences,
                "tokens": s.tokens,
                "area": scores.area_of(wrong, s.values),
                "gain": scores.gain_of(wrong, s.values, one[0].values),
            }
            for s in every
        ],
        "curve": curve,
        "uncertainty": {
            "right": np.sort(asked.greedy.nll[~wrong]),
            "wrong": np.sort(asked.greedy.nll[wrong]),
        },
    }


def _print_summary(findings: dict[str, Any]) -> None:
    print(f"right    {findings['accuracy']}")
    print("table    answers  tokens  area under ROC        less that of G-NLL")
    for row in findings["scores"]:
        print(
            f"         {row['sequences']:7}  {row['tokens']:6.1f}  {row['area']!s:20}  "
            f"{row['gain']!s:26}  {row['name']}"
        )
