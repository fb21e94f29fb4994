"""The training loop: one compiled step, evaluation, checkpoints, clean stopping."""

import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import nnx

from .checkpoints import Checkpoints, Progress, Record
from .corpus import Batches
from .failures import Failure, Interrupted
from .model import LanguageModel
from .objective import held_out_sums, mean_loss
from .options import Options


def build(
    options: Options, vocabulary_size: int
) -> tuple[LanguageModel, nnx.Optimizer]:
    """Model and optimiser before the first step; the seed decides every weight."""
    transformation = optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(
            learning_rate(options),
            b2=0.95,
            weight_decay=options.weight_decay,
            mask=_matrices_of_the_blocks,
        ),
    )

    @nnx.jit  # one program instead of one for every initialiser
    def create() -> tuple[LanguageModel, nnx.Optimizer]:
        model = LanguageModel(
            vocabulary_size=vocabulary_size,
            width=options.width,
            layers=options.layers,
            heads=options.heads,
            feed_forward=options.feed_forward,
            rngs=nnx.Rngs(options.seed),
        )
        return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)

    return create()


def learning_rate(options: Options) -> optax.Schedule:
    """Linear warm-up to the peak, then half a cosine down to a tenth of it."""
    return optax.warmup_cosine_decay_schedule(
        init_value=options.learning_rate / (options.warmup + 1),
        peak_value=options.learning_rate,
        warmup_steps=options.warmup,
        decay_steps=options.steps,
        end_value=options.learning_rate / 10,
    )


@functools.partial(nnx.jit, static_argnames="loss", donate_argnums=(0, 1))
def train_step(
    model: LanguageModel,
    optimizer: nnx.Optimizer,
    inputs: jax.Array,
    labels: jax.Array,
    *,
    loss: str,
) -> tuple[jax.Array, jax.Array]:
    """One update in place; returns the loss before it and the gradient's norm."""

    def objective(model: LanguageModel) -> jax.Array:
        return mean_loss(model(inputs), labels, loss=loss)

    value, gradient = nnx.value_and_grad(objective)(model)
    optimizer.update(model, gradient)
    squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient)]
    return value, jnp.sqrt(sum(squares))


@nnx.jit
def _evaluation_step(model: LanguageModel, inputs: jax.Array, labels: jax.Array):
    return held_out_sums(model(inputs), labels)


def evaluate(model: LanguageModel, windows: np.ndarray, batch: int) -> Record:
    """Mean loss (nats a token) and top-1 accuracy on windows of held-out text."""
    loss = correct = 0.0
    for start in range(0, len(windows), batch):
        part = jnp.asarray(windows[start : start + batch])
        sums = _evaluation_step(model, part[:, :-1], part[:, 1:])
        loss += float(sums["loss"])
        correct += float(sums["correct"])
    tokens = windows[:, 1:].size
    return {"held_out_loss": loss / tokens, "held_out_accuracy": correct / tokens}


class Stop:
    """Remembers the first SIGINT or SIGTERM; a second one interrupts at once."""

    signal_number = 0

    def __call__(self, number: int, frame: object) -> None:
        if self.signal_number:
            raise Interrupted("stopped at once, without a new checkpoint.", number)
        self.signal_number = number

    def raise_if_asked(self, message: str) -> None:
        if self.signal_number:
            name = signal.Signals(self.signal_number).name
            raise Interrupted(f"{name}: {message}", self.signal_number)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within the block SIGINT and SIGTERM only ask to stop."""
    stop = Stop()
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    model: LanguageModel,
    optimizer: nnx.Optimizer,
    progress: Progress,
    *,
    options: Options,
    batches: Batches,
    held_out: np.ndarray,
    checkpoints: Checkpoints,
    stop: Stop,
    publish: Callable[[list[Record]], None],
) -> float:
    """Runs from `progress.step` to `options.steps`; returns trained tokens per second.

    The speed counts neither the first step of this process, which compiles, nor
    evaluation and checkpoints; nan if no other step ran.
    """
    rates = np.asarray(learning_rate(options)(jnp.arange(options.steps)))
    step_tokens = options.batch * options.context
    first, spent, timed = progress.step, 0.0, 0

    def evaluate_now() -> None:
        result = evaluate(model, held_out, options.batch)
        progress.history[-1].update(result)
        loss = result["held_out_loss"]
        bar.write(
            f"step {progress.step:>5}  held-out loss {loss:.4f}  "
            f"perplexity {_exp(loss):>11,.1f}  top-1 {result['held_out_accuracy']:.1%}"
        )

    def save() -> None:
        checkpoints.save(progress, model, optimizer)
        publish(progress.history)

    with tqdm.tqdm(
        total=options.steps,
        initial=progress.step,
        desc="training",
        dynamic_ncols=True,
        disable=None,  # without a terminal only the evaluations are printed
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
        "[{elapsed}, {remaining} left] {postfix}",
    ) as bar:
        if not progress.history:
            progress.history.append({"step": 0, "tokens": 0})
            evaluate_now()
        while progress.step < options.steps:
            begin = time.perf_counter()
            inputs, labels = map(jnp.asarray, batches.at(progress.step))
            value, norm = map(
                float, train_step(model, optimizer, inputs, labels, loss=options.loss)
            )
            if progress.step > first:
                spent, timed = spent + time.perf_counter() - begin, timed + step_tokens
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise Failure(
                    f"the loss or its gradient is not finite at step "
                    f"{progress.step + 1}; a lower --learning-rate or --clip may help."
                )
            progress.history.append(
                {
                    "step": progress.step + 1,
                    "tokens": (progress.step + 1) * step_tokens,
                    "train_loss": value,
                    "gradient_norm": norm,
                    "learning_rate": float(rates[progress.step]),
                }
            )
            progress.step += 1
            speed = f"{timed / spent:,.0f} tokens/s" if spent else "compiled"
            bar.set_postfix_str(
                f"loss {value:.3f}, perplexity {_exp(value):,.0f}, {speed}",
                refresh=False,
            )
            bar.update()
            last = progress.step == options.steps
            if last or progress.step % options.evaluate_every == 0:
                evaluate_now()
            if last or progress.step % options.checkpoint_every == 0:
                save()
            if stop.signal_number and not last:
                save()
                bar.close()
                stop.raise_if_asked(
                    f"stopped after step {progress.step} of {options.steps}; "
                    "checkpoint written, the same command resumes."
                )
    return timed / spent if spent else math.nan


def losses_of_first_steps(
    options: Options,
    vocabulary_size: int,
    batches: Batches,
    *,
    loss: str,
    steps: int,
    stop: Stop,
) -> list[float]:
    """Trains anew from the same weights on the same batches with another loss."""
    if not steps:
        return []
    model, optimizer = build(options, vocabulary_size)
    losses = []
    for position in tqdm.trange(steps, desc=f"comparing with {loss}", disable=None):
        inputs, labels = map(jnp.asarray, batches.at(position))
        losses.append(float(train_step(model, optimizer, inputs, labels, loss=loss)[0]))
        stop.raise_if_asked(
            "stopped during the comparison; training is complete and saved, the same "
            "command makes the report."
        )
    return losses


def _matrices_of_the_blocks(parameters):
    # The table is left out: decay would pull at rows that a batch does not contain.
    return jax.tree.map_with_path(
        lambda path, leaf: "kernel" in jax.tree_util.keystr(path), parameters
    )


def _exp(loss: float) -> float:
    return float(jnp.exp(min(loss, 80.0)))
