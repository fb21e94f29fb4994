"""The command line of `distillation.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from language_model.options import Options as LanguageModelOptions
from study import command_line
from study.command_line import Flag

DEFAULTS = LanguageModelOptions()
GLYPH_METHODS = ("CE", "KD", "DKD", "NKD", "USKD")
TEXT_METHODS = ("CE", "KD", "NKD", "reverse-KL", "JS")


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    corpus: Annotated[pathlib.Path, Flag("xz text of speeches")] = DEFAULTS.corpus
    vocabulary: Annotated[pathlib.Path, Flag("xz list of tokens")] = DEFAULTS.vocabulary
    cache: Annotated[pathlib.Path, Flag("folder in which token ids are kept")] = (
        DEFAULTS.cache
    )
    tokens: Annotated[int, Flag("entries of the vocabulary", least=256)] = 130_072
    glyph_methods: Annotated[
        tuple[str, ...], Flag("losses of glyph students", choices=GLYPH_METHODS)
    ] = GLYPH_METHODS
    text_methods: Annotated[
        tuple[str, ...], Flag("losses of text students", choices=TEXT_METHODS)
    ] = TEXT_METHODS
    glyph_steps: Annotated[int, Flag("optimiser steps of a glyph model")] = 800
    mcmi_steps: Annotated[int, Flag("steps of tuning the teacher by MCMI")] = 200
    mcmi_percent: Annotated[
        int, Flag("weight of mutual information, in hundredths")
    ] = 20
    shots: Annotated[int, Flag("images a class of the few-shot students")] = 6
    teacher_width: Annotated[int, Flag("features of the glyph teacher")] = 384
    student_width: Annotated[int, Flag("features of a glyph student")] = 16
    text_teacher_width: Annotated[int, Flag("features of the text teacher")] = 96
    text_teacher_layers: Annotated[int, Flag("layers of the text teacher")] = 2
    text_student_width: Annotated[int, Flag("features of a text student")] = 32
    text_teacher_steps: Annotated[int, Flag("steps of the text teacher")] = 160
    text_steps: Annotated[int, Flag("steps of a text student")] = 60
    text_batch: Annotated[int, Flag("sequences a step")] = 4
    context: Annotated[int, Flag("tokens a sequence")] = 48
    held_out: Annotated[int, Flag("sequences of the evaluation")] = 24
    memory_rows: Annotated[int, Flag("rows of the memory comparison")] = 1024
    seed: Annotated[int, Flag("decides weights, images, batches", least=0)] = 0
    out: Annotated[
        pathlib.Path, Flag("folder of checkpoints, numbers and the picture")
    ] = pathlib.Path("runs/distillation")
    fresh: Annotated[bool, Flag("delete the run in --out and start anew")] = False


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "tokens": 1000,
        "glyph_methods": ("CE", "NKD"),
        "text_methods": ("CE", "KD"),
        "glyph_steps": 60,
        "mcmi_steps": 20,
        "teacher_width": 96,
        "student_width": 16,
        "text_teacher_width": 32,
        "text_teacher_layers": 1,
        "text_student_width": 16,
        "text_teacher_steps": 24,
        "text_steps": 8,
        "context": 16,
        "held_out": 4,
        "memory_rows": 256,
        "out": pathlib.Path("runs/distillation-smoke"),
    },
}

# What a checkpoint depends on. A run resumes only when all of these are the same.
NOT_IDENTITY = {
    "corpus",
    "vocabulary",
    "cache",
    "glyph_methods",
    "text_methods",
    "held_out",
    "memory_rows",
    "out",
}
IDENTITY = tuple(
    field.name
    for field in dataclasses.fields(Options)
    if field.name not in NOT_IDENTITY | {"fresh"}
)


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="distillation.py",
        description="Distil glyph classifiers and language models with a large "
        "vocabulary, and compare the losses that do it.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if o.text_teacher_width % 4 or o.text_student_width % 4:
        return "--text-teacher-width and --text-student-width must be multiples of 4"
    return None
