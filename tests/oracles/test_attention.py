"""The oracle of attention agrees with differences and with a second program."""

import pathlib

import numpy as np
import pytest

from tests.oracles.attention import attention

DATA = pathlib.Path(__file__).parent.parent / "data"


def test_agrees_with_independent_vectors():
    data = np.load(DATA / "radial_attention_case0.npz")
    n = data["in_q"].shape[1]
    allowed = np.unpackbits(data["out_mask"], axis=1, count=n).astype(bool)
    allowed[data["in_masked_row"]] = False
    found = attention(
        *(data["in_" + name] for name in "qkv"),
        allowed=allowed,
        g_out=data["in_dout"],
        g_lse=np.zeros((1, n, 4)),
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    close(found.out, data["out_out"])  # stored in float32
    close(found.lse, np.moveaxis(data["out_lse"], 1, 2))
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        close(found.gradients[name], data["out_d" + letter])


@pytest.mark.parametrize("normalizer", ["softmax", "softplus", "stablemax"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_are_those_of_differences(normalizer, softcap):
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "query": (2, 5, 4, 3),
        "key": (2, 6, 2, 3),
        "value": (2, 6, 2, 7),
        "bias": (2, 1, 5, 6),
        "scale": (),
    }
    if normalizer == "softmax":
        shapes["sinks"] = (4,)
    arrays = {
        name: np.asarray(random.normal(size=shape)) for name, shape in shapes.items()
    }
    arrays["bias"][0, 0, 2] = -np.inf
    allowed = random.random((2, 4, 5, 6)) < 0.6
    allowed[:, :, 3] = False
    options = {
        "allowed": allowed,
        "normalizer": normalizer,
        "softcap": softcap,
    }
    g_out, g_lse = random.normal(size=(2, 5, 4, 7)), random.normal(size=(2, 5, 4))

    def total(**arrays):
        found = attention(**arrays, **options)
        lse = np.where(found.lse == -np.inf, 0, found.lse)
        return (g_out * found.out).sum() + (g_lse * lse).sum()

    gradients = attention(**arrays, **options, g_out=g_out, g_lse=g_lse).gradients
    assert gradients.keys() == arrays.keys()
    for name, array in arrays.items():
        direction, step = random.normal(size=array.shape), 1e-6
        ends = [
            total(**{**arrays, name: array + sign * step * direction})
            for sign in (1, -1)
        ]
        difference = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(
            (gradients[name] * direction).sum(), difference, rtol=1e-6, atol=1e-7
        )


def test_is_the_definition_row_by_row():
    """Without einsum, head groups or shifts."""
    random = np.random.default_rng(1)
    query, key = random.normal(size=(1, 3, 4, 2)), random.normal(size=(1, 5, 2, 2))
    value, bias = random.normal(size=(1, 5, 2, 3)), random.normal(size=(1, 4, 3, 5))
    functions = {
        "softmax": np.exp,
        "softplus": lambda z: np.log(1 + np.exp(z)),
        "stablemax": lambda z: 1 + z if z >= 0 else 1 / (1 - z),
    }
    for name, f in functions.items():
        found = attention(query, key, value, bias=bias, scale=0.7, normalizer=name)
        for t, n in np.ndindex(3, 4):
            weights = [
                f(0.7 * query[0, t, n] @ key[0, j, n // 2] + bias[0, n, t, j])
                for j in range(5)
            ]
            total = sum(w * value[0, j, n // 2] for j, w in enumerate(weights))
            np.testing.assert_allclose(found.out[0, t, n], total / sum(weights))
            np.testing.assert_allclose(found.lse[0, t, n], np.log(sum(weights)))
