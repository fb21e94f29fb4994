"""What a training step costs against the number of tokens: pairs, memory, time."""

import time
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from flax import nnx

from softlib.attention import block_plan
from softlib.masks import All, radial_pair_count

from . import model as model_
from .options import Options
from .task import mean_loss
from .video import PLACES

# Frames of the chart of pairs, which costs nothing: 880 to 450,560 tokens.
PAIR_FRAMES = tuple(2**i for i in range(2, 12))
# Beyond this the blocks are not listed only to count them.
MOST_LISTED = 512


class Pairs(NamedTuple):
    """Keys per query, the mean over the queries of a clip.

    Attributes:
        tokens: n.
        kept: Pairs that attend, divided by n.
        visited: Pairs of the blocks that a kernel visits, divided by n; None where
            they were not counted.
    """

    tokens: int
    kept: float
    visited: float | None


class Cost(NamedTuple):
    """Loss and gradients of one clip.

    Attributes:
        attention: `dense`, `radial`, or `stored`: dense with all scores in memory.
        tokens: n.
        temporary_bytes: Beside arguments and results, from the compiled program; None
            where XLA does not tell.
        seconds: The fastest run; None where it was not run.
    """

    attention: str
    tokens: int
    temporary_bytes: int | None
    seconds: float | None


def pairs(options: Options) -> list[Pairs]:
    """Counted in closed form: no mask of n x n is made."""
    mask, found = model_.radial(options), []
    for frames in PAIR_FRAMES:
        n, visited = frames * PLACES, None
        kept = radial_pair_count(frames, PLACES, rule="pow2", min_window=options.block)
        if frames <= MOST_LISTED:
            sizes = {"block_query": options.block, "block_key": options.block}
            visited = block_plan(mask, n, n, **sizes).density * n
        found.append(Pairs(n, kept / n, visited))
    return found


def costs(model: model_.VideoModel, options: Options) -> list[Cost]:
    """Compiles a step for each length and attention, and times those that stream."""
    cases = [
        (frames, attention)
        for frames in options.cost_frames
        for attention in ("stored", "dense", "radial")
    ]
    models = {
        "stored": model_.under(model, All(), implementation="reference"),
        "dense": model_.under(model, All()),
        "radial": model_.under(model, model_.radial(options)),
    }
    bar = tqdm.tqdm(cases, desc="      cost", disable=None, dynamic_ncols=True)
    return [_cost(frames, name, models[name], options) for frames, name in bar]


def _cost(
    frames: int, attention: str, model: model_.VideoModel, options: Options
) -> Cost:
    graph, state = nnx.split(model)

    def loss(state, latents, hidden):
        return mean_loss(nnx.merge(graph, state), latents, hidden)

    random = np.random.default_rng(options.seed)
    latents = random.normal(size=(1, frames, PLACES, options.components)).astype("f4")
    hidden = random.random((1, frames, PLACES)) < options.hidden_percent / 100
    program = jax.jit(jax.value_and_grad(loss)).lower(state, latents, hidden).compile()
    analysis = program.memory_analysis()
    size = analysis and int(analysis.temp_size_in_bytes)
    seconds = None
    if attention != "stored":
        jax.block_until_ready(program(state, latents, hidden))
        seconds = min(
            _timed(program, state, latents, hidden) for _ in range(options.repeats)
        )
    return Cost(attention, frames * PLACES, size, seconds)


def _timed(program, *arguments) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - begin
