"""Results of a device against float64."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import softlib
from softlib.testing import assert_close

from . import kernels
from .device import Here
from .outcome import PLAIN_ONLY, RIGHT, Case, Outcome
from .problem import Problem, Program, Size, with_gradients


def check(case: Case, problem: Problem, device: Here) -> Outcome:
    """Runs the program that users would, and compares it with float64.

    Raises:
        NoKernel: The device has kernels for the problem, and the program does not.
    """
    size = problem.sizes[case.size]
    program = problem.program(None, **size.options)
    shape = jax.eval_shape(program, *size.shapes_and_dtypes(case.dtype))
    arrays, cotangent = size.arrays(case.dtype), size.cotangent(shape)
    whole, given = whole_of(problem, program, cotangent, arrays)
    text, compiled = device.compiled(whole, *given)
    counts, tiles = [], []
    if device.target in problem.targets:
        texts = [text]
        if problem.differentiated:
            texts.insert(0, device.text(program, *arrays))
        with device.context():
            explained = softlib.explain(whole, *given)
        counts = kernels.require(texts, explained)
        tiles = kernels.tiles_of(explained, device.platform)
    found = [np.asarray(x, np.float64) for x in jax.tree.leaves(compiled(*given))]
    expected = problem.expected(size, arrays, cotangent)
    if size.queries:
        found[0] = found[0][:, np.array(size.queries)]
    errors, verdict = compare(found, expected, case.dtype, size)
    if verdict == RIGHT and not counts:
        verdict = PLAIN_ONLY
    return Outcome(case, verdict, tuple(counts), tuple(tiles), errors)


def whole_of(
    problem: Problem, program: Program, cotangent: Any, arrays: Sequence[Any]
) -> tuple[Program, tuple[Any, ...]]:
    """The program with its gradients, if these have kernels, and its arguments."""
    if not problem.differentiated:
        return program, tuple(arrays)
    return with_gradients(program, problem.differentiated), (cotangent, *arrays)


def compare(
    found: Sequence[np.ndarray], expected: Sequence[np.ndarray], dtype: str, size: Size
) -> tuple[tuple[tuple[float, float], ...], str]:
    """The errors of each result, and `RIGHT` or what is wrong with the worst.

    The largest error shows a wrong entry, the norm what is a little off everywhere: an
    entry among many small ones may be wrong by less than the largest value allows.
    """
    # Sums are in float32: in 16 bits results are rounded a few times, however long the
    # sums are.
    is_wide = dtype == "float32"
    length = max(map(max, size.shapes)) if is_wide else 1
    most = 2 * float(jnp.finfo(dtype).eps) * float(np.sqrt(length))
    errors, faults = [], []
    for place, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        name = f"gradient {place}" if place else "result"
        scale = float(np.max(np.abs(wanted), initial=0.0)) or 1.0
        gap = value - wanted if value.shape == wanted.shape else np.array(np.inf)
        norm = float(np.linalg.norm(wanted)) or 1.0
        pair = float(np.abs(gap).max(initial=0.0)) / scale, _norm(gap) / norm
        errors.append(pair)
        try:
            assert_close(value / scale, wanted / scale, dtype=dtype, length=length)
        except AssertionError as error:
            faults.append(f"{name}: {error}")
            continue
        if not pair[1] <= most:
            faults.append(f"{name}: errors of norm {pair[1]:.2g}, {most:.2g} allowed")
    return tuple(errors), "; ".join(faults) or RIGHT


def _norm(gap: np.ndarray) -> float:
    return float(np.linalg.norm(gap))
