"""A whole run in order: glyph models, the tuned teacher, language models, report."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from language_model.training import Stop
from study import output, training
from study.session import stoppable

from softlib import information

from . import glyph_losses, glyphs, memory, report, text, text_losses
from .glyph_models import Classifier, logits
from .options import IDENTITY, Options

BATCH = 128
EVALUATIONS = 4


@stoppable
def run(options: Options, stop: Stop) -> None:
    """Trains (or resumes, or finds complete) the run in `options.out` and reports."""
    identity = {name: getattr(options, name) for name in IDENTITY}
    histories: dict[str, list] = {}

    def train(model: nnx.Module, plan: training.Plan) -> None:
        folder = options.out / "checkpoints"
        histories[plan.name] = training.train(
            model, plan, folder=folder, identity=identity, stop=stop
        )

    found, images = _glyphs(options, train)
    found["text"] = _text(options, train, histories)
    found["memory"] = memory.measure(options)
    stop.raise_if_asked("all models are trained, the same command makes the report.")
    settings = dataclasses.asdict(options)
    output.write_json(
        options.out / "metrics.json",
        {"settings": settings, **found, "histories": histories},
    )
    report.draw(options.out / "report.png", found, images, histories)
    _print_summary(found, options)
    print(f"picture  {options.out / 'report.png'}")


# ------------------------------------------------------------------------------- glyphs
def _glyphs(options: Options, train: Callable) -> tuple[dict[str, Any], Any]:
    seen, held_out = glyphs.load(options.seed)
    few = seen.few(options.shots, options.seed)
    print(
        f"glyphs   {len(seen.labels):,} images of {len(glyphs.CHARACTERS)} characters, "
        f"{len(held_out.labels):,} of other fonts held out\ncredit   {glyphs.CREDIT}"
    )

    def build(width: int) -> Classifier:
        return Classifier(width, rngs=nnx.Rngs(options.seed))

    def plan(name, loss, data, *, steps=options.glyph_steps, teacher=None, rate=3e-3):
        def batch_at(step):
            own = data.at(step, BATCH, options.seed)
            given = None if teacher is None else logits(teacher, own.pixels)
            return own.pixels, own.labels, given

        return training.Plan(
            name=name,
            steps=steps,
            batch_at=batch_at,
            loss=loss,
            evaluate=lambda model: 1 - _accuracy(model, held_out),
            evaluate_every=max(1, steps // EVALUATIONS),
            learning_rate=rate,
        )

    teacher = build(options.teacher_width)
    train(teacher, plan("teacher", glyph_losses.cross_entropy, seen))
    informative = nnx.clone(teacher)
    train(informative, _informative(informative, seen, plan, options))

    accuracy = {}
    for name in options.glyph_methods:
        loss = glyph_losses.METHODS[name]
        student = build(options.student_width)
        train(student, plan(f"glyph {name}", loss, seen, teacher=teacher))
        accuracy[name] = _accuracy(student, held_out)
    shots = {}
    for name, given in (("CE", None), ("MLL", teacher), ("MCMI", informative)):
        loss = glyph_losses.cross_entropy if given is None else glyph_losses.plain
        student = build(options.student_width * 4)
        train(student, plan(f"few {name}", loss, few, teacher=given))
        shots[name] = _accuracy(student, held_out)

    teachers = {"MLL": teacher, "MCMI": informative}
    mean = lambda model: float(
        information.conditional_mutual_information(
            logits(model, seen.pixels), jnp.asarray(seen.labels)
        ).mean()
    )
    found = {
        "glyph_accuracy": accuracy,
        "few_shot_accuracy": shots,
        "teacher_accuracy": {n: _accuracy(t, held_out) for n, t in teachers.items()},
        "teacher_cmi": {n: mean(t) for n, t in teachers.items()},
    }
    probabilities = {
        n: np.asarray(jax.nn.softmax(logits(t, seen.pixels)))
        for n, t in teachers.items()
    }
    return found, (seen, probabilities)


def _informative(
    model: Classifier, seen: glyphs.Images, plan: Callable, options: Options
) -> training.Plan:
    """Tuning by MCMI; the centroids are those of the model before every step."""
    weight = jnp.float32(options.mcmi_percent / 100)

    @nnx.jit
    def centroids(model: Classifier, images, labels) -> jax.Array:
        probs = jax.nn.softmax(model(images))
        classes = len(glyphs.CHARACTERS)
        return information.class_centroids(probs, labels, num_classes=classes)

    own = plan("tuned", glyph_losses.informative, seen, steps=options.mcmi_steps)

    def batch_at(step):
        pixels, labels, _ = own.batch_at(step)
        every = centroids(model, jnp.asarray(seen.pixels), jnp.asarray(seen.labels))
        return pixels, labels, every, weight

    return own._replace(batch_at=batch_at, learning_rate=3e-4)


def _accuracy(model: Classifier, images: glyphs.Images) -> float:
    z = logits(model, jnp.asarray(images.pixels))
    return glyph_losses.accuracy(z, jnp.asarray(images.labels))


# --------------------------------------------------------------------------------- text
def _text(options: Options, train: Callable, histories: dict) -> dict[str, Any]:
    corpus = text.load(options)
    batches = text.batches(corpus, options)
    inputs, labels = (jnp.asarray(a) for a in text.held_out(corpus, options))
    print(
        f"text     {len(corpus.train):,} tokens, vocabulary {options.tokens:,}; "
        f"{options.text_teacher_width} features teach {options.text_student_width}",
        flush=True,
    )
    cost = nnx.jit(text_losses.cross_entropy)
    divergence = nnx.jit(text_losses.divergence, static_argnames="reverse")
    teacher = text.teacher(options)
    plan = training.Plan(
        name="text teacher",
        steps=options.text_teacher_steps,
        batch_at=batches.at,
        loss=text_losses.cross_entropy,
        evaluate=lambda model: float(cost(model, inputs, labels)),
        evaluate_every=max(1, options.text_teacher_steps // EVALUATIONS),
        learning_rate=5e-3,
    )
    train(teacher, plan)
    there = text.logits(teacher, inputs)

    def batch_at(step):
        tokens, following = batches.at(step)
        return tokens, following, text.logits(teacher, jnp.asarray(tokens))

    found = {"teacher": {"loss": float(cost(teacher, inputs, labels))}}
    for name in options.text_methods:
        loss = text_losses.METHODS[name]
        student = text.student(options)
        own = plan._replace(
            name=f"text {name}",
            steps=options.text_steps,
            batch_at=batch_at,
            loss=loss,
            evaluate=lambda model: float(divergence(model, inputs, there)),
            evaluate_every=max(1, options.text_steps // EVALUATIONS),
        )
        train(student, own)
        found[name] = {
            "loss": float(cost(student, inputs, labels)),
            "divergence": float(divergence(student, inputs, there)),
            "seconds_per_step": training.seconds_per_step(histories[own.name]),
            "reverse": float(divergence(student, inputs, there, reverse=True)),
        }
        print(f"trained  {name}: {found[name]['divergence']:.3f} nats", flush=True)
    return found


def _print_summary(found: dict[str, Any], options: Options) -> None:
    percent = lambda numbers: ", ".join(f"{n} {v:.1%}" for n, v in numbers.items())
    cmi = found["teacher_cmi"]
    print(
        f"glyphs   held-out accuracy of students: {percent(found['glyph_accuracy'])}\n"
        f"teacher  {percent(found['teacher_accuracy'])}; mutual information "
        f"{cmi['MLL']:.4f} -> {cmi['MCMI']:.4f} nats\n"
        f"few-shot {options.shots} images a class: "
        f"{percent(found['few_shot_accuracy'])}"
    )
    for name, numbers in found["text"].items():
        if name != "teacher":
            print(
                f"text     {name}: loss {numbers['loss']:.3f}, from the teacher "
                f"{numbers['divergence']:.3f} (reverse {numbers['reverse']:.3f})"
            )
    sizes = found["memory"]
    if None not in sizes.values():
        text_ = ", ".join(f"{n} {v / 2**20:.0f} MiB" for n, v in sizes.items())
        print(f"memory   {options.memory_rows} rows x {options.tokens:,}: {text_}")
    print(
        "limits   small models and few steps: the order of losses is that of this run; "
        "memory is exact"
    )
