"""The first study: preference losses on pairs of which some are in the wrong order."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from language_model.model import LanguageModel
from language_model.training import Stop
from study import training

from softlib.scoring import annotate_preferences, density_ratio_reward

from . import model as model_, pairs as pairs_
from .options import Options
from .text import Text, rows_at

LOSSES = ("dpo", "cdpo", "rdpo")


class Tuned(NamedTuple):
    """What a tuned model makes of held-out prompts.

    Attributes:
        loss: One of `LOSSES`, or "base" before tuning.
        flips: Per cent of its training pairs in the wrong order.
        accuracy: Share of the pairs of responses whose order by the implicit reward,
            beta log(policy / reference), is that by the reward.
        scale: Slope of the implicit reward in the reward, within prompts: 1 for an
            annotator who is believed exactly.
        best: Mean reward of the one of four responses that it would choose.
        drawn: Mean reward of the responses that it gives itself.
    """

    loss: str
    flips: int
    accuracy: float
    scale: float
    best: float
    drawn: float


def run(
    base: LanguageModel,
    pairs: pairs_.Pairs,
    text: Text,
    options: Options,
    *,
    folder: pathlib.Path,
    identity: dict[str, Any],
    stop: Stop,
) -> list[Tuned]:
    """A model for each loss and share of flips; without flips the losses are one."""
    where = model_.response_where(pairs.tokens.shape[-1], options.prompt)
    # Numbers per sequence, once: the reference is never called in training.
    reference = model_.all_log_probs(
        base, pairs.tokens.reshape(-1, pairs.tokens.shape[-1]), where
    ).reshape(len(pairs.tokens), 2)
    swapped = pairs.tokens[:, ::-1]
    of_base = model_.all_token_log_probs(base, _flat(pairs.groups), where)
    found = [measure("base", 0, base, of_base, pairs, text, options)]
    # DPO is the robust loss that is told of no flips: two programs are enough.
    robust, conservative = (
        functools.partial(
            model_.preference_loss,
            prompt=options.prompt,
            beta=options.beta,
            robust=is_robust,
        )
        for is_robust in (True, False)
    )
    for flips in options.flips:
        flipped = pairs.flipped(flips)
        for loss in LOSSES if flips else LOSSES[:1]:
            model = model_.copy_of(base)
            training.train(
                model,
                _plan(
                    f"{loss}-{flips}",
                    np.where(flipped[:, None, None], swapped, pairs.tokens),
                    np.where(flipped[:, None], reference[:, ::-1], reference),
                    0.0 if loss == "dpo" else flips / 100,
                    conservative if loss == "cdpo" else robust,
                    options,
                ),
                folder=folder,
                identity=identity,
                stop=stop,
            )
            found.append(measure(loss, flips, model, of_base, pairs, text, options))
            print(f"tuned    {line(found[-1])}", flush=True)
    return found


def line(tuned: Tuned) -> str:
    return (
        f"{tuned.loss:4} {tuned.flips:2d} % flipped: {tuned.accuracy:.1%} of held-out "
        f"pairs in order, scale {tuned.scale:.2f}, own words of {-tuned.drawn:.2f} "
        "letters"
    )


def _plan(
    name: str,
    tokens: np.ndarray,
    reference: np.ndarray,
    rate: float,
    loss: training.Loss,
    options: Options,
) -> training.Plan:
    def batch_at(step: int) -> tuple[Any, ...]:
        rows = rows_at(step, len(tokens), options.batch, options.seed)
        return (
            jnp.asarray(tokens[rows]),
            jnp.asarray(reference[rows]),
            jnp.float32(rate),
        )

    return training.Plan(
        name=name,
        steps=options.tuning_steps,
        batch_at=batch_at,
        loss=loss,
        evaluate=lambda model: {},  # `measure` says more, at the end
        evaluate_every=options.tuning_steps,
        learning_rate=options.tuning_rate,
    )


def measure(
    loss: str,
    flips: int,
    model: LanguageModel,
    of_base: np.ndarray,
    pairs: pairs_.Pairs,
    text: Text,
    options: Options,
) -> Tuned:
    """The tuned model is the strong one of a density ratio, its reference the weak."""
    where = model_.response_where(pairs.tokens.shape[-1], options.prompt)
    of_model = model_.all_token_log_probs(model, _flat(pairs.groups), where)
    ratio = density_ratio_reward(jnp.asarray(of_model), jnp.asarray(of_base))
    implicit = options.beta * np.asarray(ratio).reshape(pairs.rewards.shape)
    chosen = np.asarray(annotate_preferences(jnp.asarray(implicit)).chosen_index)
    prompts = pairs.groups[:, 0, : options.prompt]
    key = jax.random.key(options.seed + 2)
    own = model_.respond(model, prompts, options.response, key)
    return Tuned(
        loss=loss,
        flips=flips,
        accuracy=accuracy(implicit, pairs.rewards),
        scale=scale(implicit, pairs.rewards),
        best=float(np.take_along_axis(pairs.rewards, chosen[:, None], 1).mean()),
        drawn=float(pairs_.rewards(own, options.prompt, text.tokenizer).mean()),
    )


def accuracy(implicit: np.ndarray, rewards: np.ndarray) -> float:
    """Of pairs of responses to a prompt (groups, n); equal rewards are no pair."""
    i, j = np.triu_indices(rewards.shape[1], 1)
    wanted = rewards[:, i] - rewards[:, j]
    found = implicit[:, i] - implicit[:, j]
    right = np.where(found == 0, 0.5, (found > 0) == (wanted > 0))
    return float(right[wanted != 0].mean())


def scale(implicit: np.ndarray, rewards: np.ndarray) -> float:
    """Least squares within the groups: only differences to a prompt mean anything."""
    centred = lambda x: x - x.mean(1, keepdims=True)
    x, y = centred(rewards), centred(implicit)
    return float((x * y).sum() / (x * x).sum())


def _flat(groups: np.ndarray) -> np.ndarray:
    return groups.reshape(-1, groups.shape[-1])
