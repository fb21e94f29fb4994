"""How scores become weights: each kind against its definition, without an attention."""

from typing import Any

import jax
import numpy as np
import pytest

from softlib.attention._engine import scores as kinds
from tests.host import jnp

# Both sides of every case distinction, and far out; two rows, the second without a
# positive score. Each has a pair that does not attend at the end.
Z = np.array([-200.0, -36.5, -35.5, -3.0, -0.5, 0.0, 0.25, 1.0, 4.0, 30.0, 7.0])
SCORES = np.stack([Z, -np.abs(Z) - 0.1])
ATTENDS = np.arange(len(Z)) < len(Z) - 1
# Of the kind whose rows have numbers: offset and inverse.
ROWS = np.array([[0.3, 0.01], [0.5, 0.7]])[..., None]


def softplus(z):
    return np.logaddexp(z, 0)


def sigmoid(z):
    return np.exp(-np.logaddexp(-z, 0))


def reweighted(power):
    base = lambda z: np.maximum(softplus(z) - ROWS[0], 0) * ROWS[1]
    slope = lambda z: np.where(
        base(z) > 0,
        power * np.where(base(z) > 0, base(z), 1) ** (power - 1) * ROWS[1],
        0,
    )
    return lambda z: base(z) ** power, slope


# The kind, f, its derivative by the score, and by minus the offset.
KINDS: dict[str, Any] = {
    "softmax": (kinds.Softmax(), np.exp, np.exp, None),
    "log_softplus": (kinds.LogSoftplus(), softplus, sigmoid, None),
    "softplus": (kinds.Softplus(), softplus, sigmoid, None),
    "moments": (kinds.SoftplusMoments(), softplus, sigmoid, None),
    "stablemax": (
        kinds.StableMax(),
        lambda z: np.where(z >= 0, 1 + z, 1 / (1 + abs(z))),
        lambda z: np.where(z >= 0, 1, 1 / (1 + abs(z)) ** 2),
        None,
    ),
    **{
        f"power {power}": (
            kinds.Reweighted(power),
            reweighted(power)[0],
            lambda z, slope=reweighted(power)[1]: slope(z) * sigmoid(z),
            lambda z, slope=reweighted(power)[1]: slope(z),
        )
        for power in (1.0, 2.0, 2.5, 0.5)
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_weights_and_slopes_are_those_of_the_definition(name):
    kind, f, by_score, by_offset = KINDS[name]
    rows: Any = (*ROWS,) if by_offset else ()
    values = None if name == "moments" else np.linspace(-1, 1, Z.size)

    @jax.jit
    def run(z, rows):
        entries = jnp.where(ATTENDS, kind.entries(z, rows), kind.absent)
        found = {}
        for part, given in (("rows", entries), ("empty", entries[:, -1:])):
            zeros = None if values is None else jnp.zeros(2)
            state = kind.accumulator.init((2,), z.dtype, weighted=zeros)
            seen = [given[:, :3], given[:, 3:]] if part == "rows" else [given, given]
            start = 0
            for block in seen:
                stop = start + block.shape[1]
                weigh = None
                if values is not None:
                    of = values[start:stop]
                    weigh = lambda weights, of=of: weights @ of
                state = kind.accumulator.update(state, block, axis=-1, weigh=weigh)
                start = stop
            found[part] = kind.finalize(state)
        inverse = kind.inverse(found["rows"].normalizer)[:, None]
        weights = kind.weights(z, rows, inverse)
        of_empty = kind.inverse(found["empty"].normalizer)[:, None]
        return found, weights, kind.weights(z, rows, of_empty)

    with jax.enable_x64():
        found, weights, of_empty = jax.device_get(run(SCORES, rows))
    every = np.where(ATTENDS, f(SCORES), 0)
    total = every.sum(1)
    with np.errstate(divide="ignore"):
        normalizer = np.log([total, 0 * total]) if kind.is_log else [total, 0 * total]
    for part, norm in zip(("rows", "empty"), normalizer, strict=True):
        np.testing.assert_allclose(found[part].normalizer, norm, rtol=1e-12)
    if values is None:
        np.testing.assert_allclose(found["rows"].max, every.max(1), rtol=1e-12)
        np.testing.assert_array_equal(found["empty"].max, 0)
    else:
        wanted = every @ values / np.where(total > 0, total, 1)
        np.testing.assert_allclose(found["rows"].out, wanted, rtol=1e-12)
        np.testing.assert_array_equal(found["empty"].out, 0)
    close = lambda array, of: np.testing.assert_allclose(
        array[:, :-1], (of(SCORES) / total[:, None])[:, :-1], rtol=1e-10, atol=1e-300
    )
    close(weights.p, f)
    close(weights.slope, by_score)
    if by_offset:
        close(-weights.row_slope, by_offset)
    else:
        assert weights.row_slope is None
    np.testing.assert_array_equal(of_empty.p, 0)
    np.testing.assert_array_equal(of_empty.slope, 0)
