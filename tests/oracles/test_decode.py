"""The oracle of attention to a cache agrees with vectors and with differences."""

import pathlib

import numpy as np
import pytest

from tests.oracles.decode import decode

DATA = pathlib.Path(__file__).parent.parent / "data"


def test_agrees_with_independent_vectors():
    data = np.load(DATA / "unified_max_softmax_case0.npz")
    arrays = [data["in_" + name] for name in ("query", "key", "value")]
    found = decode(*arrays, lengths=data["in_lengths"])
    for name, values in (
        ("attn", found.out),
        ("lse", found.lse),
        ("rowmax", found.max_score),
    ):
        np.testing.assert_allclose(values, data["out_" + name], rtol=0, atol=1e-12)
    range_ = data["in_a"], data["in_b"]
    for criterion, name in (
        ("row_max", "out_needs_recompute"),
        ("elementwise", "out_paper_flag"),
    ):
        flags = found.outside(data["in_phi"], range_, criterion)
        np.testing.assert_array_equal(flags, data[name])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_are_those_of_differences(is_causal, softcap, with_sinks):
    random = np.random.default_rng(0)
    shapes = {"query": (3, 2, 4, 5), "key": (3, 6, 2, 5), "value": (3, 6, 2, 3)}
    arrays = {name: random.normal(size=shape) for name, shape in shapes.items()}
    arrays["scale"] = np.asarray(0.7)
    if with_sinks:
        arrays["sinks"] = random.normal(size=4)
    g_out, g_lse = random.normal(size=(3, 2, 4, 3)), random.normal(size=(3, 2, 4))
    options = {
        "lengths": [6, 1, 0],
        "is_causal": is_causal,
        "softcap": softcap,
    }

    def total(**arrays):
        found = decode(**arrays, **options)
        return (g_out * found.out).sum() + np.where(
            found.lse == -np.inf, 0, g_lse * found.lse
        ).sum()

    gradients = decode(**arrays, **options, g_out=g_out, g_lse=g_lse).gradients
    for name, array in arrays.items():
        direction, step = random.normal(size=array.shape), 1e-6
        ends = [
            total(**{**arrays, name: array + sign * step * direction})
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        expected = (gradients[name] * direction).sum()
        np.testing.assert_allclose(slope, expected, rtol=1e-7, atol=1e-8)
