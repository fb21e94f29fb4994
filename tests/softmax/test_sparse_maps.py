"""Sparsemax, entmax, tempered softmax, budget sparsemax and normmax."""

import contextlib
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.softmax import (
    budget_sparsemax,
    entmax,
    entmax15,
    normmax,
    softmax,
    sparsemax,
    support_size,
    tempered_softmax,
)
from softlib.testing import assert_close, check_transformations
from tests.compiled import f32
from tests.host import jnp
from tests.oracles import sparse_maps as oracle

CASE = pathlib.Path(__file__).parent.parent / "data" / "sparse_softmax_case0.npz"
ALPHAS = np.array([0.5, 0.9, 1.0, 1.001, 1.2, 1.5, 1.8, 2.0])
ROWS, CLASSES = len(ALPHAS), 9
NAMES = ("sparsemax", "entmax15", "entmax", "budget_sparsemax", "normmax")


def scores(classes=CLASSES, *, std=1.0, rows=ROWS, seed=0):
    return std * np.random.default_rng([seed, classes]).normal(size=(rows, classes))


def all_maps(z, alpha, where=None):
    """All maps, with a parameter per row."""
    return {
        "sparsemax": sparsemax(z, where=where),
        "entmax15": entmax15(z, where=where),
        "entmax": entmax(z, alpha=alpha, where=where),
        "budget_sparsemax": budget_sparsemax(z, budget=2 * alpha, where=where),
        "normmax": normmax(z, alpha=1 + alpha, where=where),
    }


@jax.jit
def compiled(z, alpha=None, where=None):
    """Most tests call it with (8, 9) scores in float32, for which it compiles once."""
    alpha = jnp.asarray(ALPHAS, z.dtype) if alpha is None else alpha
    return all_maps(z, alpha, jnp.ones(z.shape, bool) if where is None else where)


def run(z, alpha=ALPHAS, where: Any = True) -> dict[str, np.ndarray]:
    z = f32(z)
    found = compiled(z, f32(alpha), np.broadcast_to(where, z.shape))
    return {name: np.asarray(p) for name, p in found.items()}


def all_oracles(z, alpha):
    alpha = oracle.wide(alpha)
    return {
        "sparsemax": oracle.sparsemax(z),
        "entmax15": oracle.entmax15(z),
        "entmax": oracle.entmax(z, alpha),
        "budget_sparsemax": oracle.budget_sparsemax(z, 2 * alpha),
        "normmax": oracle.normmax(z, 1 + alpha),
    }


# ------------------------------------------------------------------------------ oracles
def test_vectors():
    with jax.enable_x64():
        case = np.load(CASE)
        names = {"1p25": 1.25, "1p5": 1.5, "2p0": 2.0}
        z, cotangent = (
            np.tile(case[name], (len(names), 1))
            for name in ("in_scores", "in_cotangent")
        )
        rows = len(case["in_scores"])
        alpha = np.repeat(list(names.values()), rows)

        @jax.jit
        def compute(z, alpha, cotangent):
            p, pullback = jax.vjp(lambda z, alpha: entmax(z, alpha=alpha), z, alpha)
            once = z[:rows]
            others = {
                "sparsemax": sparsemax(once),
                "entmax15": entmax15(once),
                "budget": budget_sparsemax(once, budget=2.0),
                "normmax": normmax(once),
            }
            return others, dict(zip(KINDS, (p, *pullback(cotangent)), strict=True))

        found, by_alpha = jax.device_get(compute(z, alpha, cotangent))
        for kind, value in by_alpha.items():
            for i, name in enumerate(names):
                found[kind + name] = value[i * rows : (i + 1) * rows]
        for name, value in found.items():
            wanted = case["out_" + name]
            np.testing.assert_allclose(value, wanted, rtol=0, atol=3e-15, err_msg=name)


KINDS = ("entmax_", "entmax_vjp_", "entmax_dalpha_")


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "bfloat16",
        pytest.param("float16", marks=pytest.mark.slow),
    ],
)
def test_matches_oracle(dtype):
    """Rows longer than a block in float32; a parameter per row."""
    classes = 2051 if dtype == "float32" else CLASSES
    with jax.enable_x64() if dtype == "float64" else contextlib.nullcontext():
        z = scores(classes).astype(jnp.dtype(dtype))
        alpha = np.asarray(ALPHAS, jnp.promote_types(dtype, jnp.float32))
        found, wanted = compiled(z, alpha), all_oracles(np.float64(z), alpha)
        for name in NAMES:
            assert found[name].dtype == z.dtype
            assert_close(found[name], wanted[name], dtype=dtype, length=classes)


def test_alphas_above_two_match_the_oracle():
    alpha = f32(np.linspace(2.1, 4, ROWS))
    z = f32(scores(std=0.3))
    p = run(z, alpha)["entmax"]
    # An error e at the edge of the support is e^(1 / (alpha - 1)) in p.
    np.testing.assert_allclose(p, oracle.entmax(z, alpha), rtol=0, atol=1e-4)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    # The steeper, the nearer to uniform on the support.
    p = run(z, np.geomspace(5, 100, ROWS))["entmax"]
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    assert (p.max(-1) <= 1).all()


@pytest.mark.parametrize("std", [0.0, 1e-6, 0.01, 10.0])
def test_large_vocabularies_in_float32(std):
    """Flat scores, with thousands in the support, and peaked ones."""
    z = f32(scores(200_000, std=std, rows=1))
    for function in (sparsemax, entmax15):
        p: Any = np.asarray(jax.jit(function)(z))
        wanted = getattr(oracle, function.__name__)(z)
        assert abs(np.asarray(p, np.longdouble).sum() - 1) < 1e-6
        np.testing.assert_allclose(p, wanted, rtol=0, atol=5e-7 * wanted.max())
        count = np.sum(wanted > 0)
        assert abs(int(support_size(p)[0]) - count) <= 1e-4 * count


# --------------------------------------------------------------------------- properties
@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 30.0]))
def test_conditions_of_the_maximum(seed, std):
    """On the support the derivative of the objective is one number, elsewhere less."""
    z = scores(std=std, seed=seed)
    p = run(z)["entmax"].astype(float)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    for row, s, q in zip(z, ALPHAS - 1, p, strict=True):
        on = q > 1e-30
        power = np.log(q[on]) if s == 0 else (q[on] ** s - 1) / s
        level = row[on] - power
        tolerance = 1e-5 * max(1, np.abs(row).max())
        assert np.ptp(level) <= tolerance
        if s > 0.1:  # below, p may underflow
            assert (row[q == 0] + 1 / s <= level.max() + tolerance).all()


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_symmetries(seed):
    """Shifts, permutations and ties; a larger score never gets less."""
    z = np.round(scores(seed=seed) * 4) / 4  # with ties, and exact sums
    order = np.random.default_rng(seed).permutation(CLASSES)
    found, shifted, permuted = run(z), run(z + 64), run(z[:, order])
    for name, p in found.items():
        np.testing.assert_allclose(p, shifted[name], atol=1e-6)
        np.testing.assert_allclose(p[:, order], permuted[name], atol=1e-6)
        steps = np.diff(np.take_along_axis(p, np.argsort(z, -1), -1), axis=-1)
        ties = np.diff(np.sort(z, -1), axis=-1) == 0
        assert (steps[~ties] >= 0).all()
        # Optimised, the last classes of a row have another instruction for powers.
        assert np.abs(steps[ties]).max(initial=0) <= 4 * np.finfo(np.float32).eps


# ------------------------------------------------------------------------------- limits
def test_entmax_contains_its_relatives():
    z = f32(scores())
    found = [run(z, np.full(ROWS, alpha))["entmax"] for alpha in (1, 1.5, 2)]
    wanted = jax.jit(lambda z: (softmax(z), entmax15(z), sparsemax(z)))(z)
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    np.testing.assert_allclose(
        run(z, np.full(ROWS, 0.5))["budget_sparsemax"], wanted[2], atol=1e-6
    )


def test_static_parameters():
    z = f32(scores())

    @jax.jit
    def static(z):
        tempered = [tempered_softmax(z, t=t) for t in (0.0, 0.75, 1.5)]
        return tempered, [entmax(z, alpha=alpha) for alpha in (2, 1.25, 0.5)]

    for values in static(z):
        for value, alpha in zip(values, (2, 1.25, 0.5), strict=True):
            wanted = oracle.entmax(np.float64(z), alpha)
            assert_close(value, wanted, dtype="float32", length=CLASSES)


def test_alpha_near_one_is_accurate():
    z = f32(scores())
    alpha = f32(1 + np.array([-1e-3, 1e-3, -1e-5, 1e-5, 2e-7, -2e-7, 1e-2, -0.01]))
    wanted = oracle.entmax(z, alpha)
    assert_close(run(z, alpha)["entmax"], wanted, dtype="float32", length=CLASSES)
    near_softmax = np.abs(wanted[:6] - oracle.entmax(z, 1)[:6])
    assert near_softmax.max() < 1e-3


def test_known_values():
    z = np.linspace(0, 1, 5)
    scaled = np.full((ROWS, CLASSES), -np.inf)
    scaled[:, :5] = [z, z, z, 2 * z, z, z, z, z]
    alpha = np.array([1, 999, 1, 1.5, 2.5, 3.5, 1, 1])
    values = run(scaled, alpha)
    wanted = {
        ("normmax", 0): [0, 0.0239, 0.1746, 0.3254, 0.4761],
        ("normmax", 1): [0, 0, 0.3330, 0.3334, 0.3336],
        ("budget_sparsemax", 2): [0, 0.125, 0.375, 0.625, 0.875],
        ("budget_sparsemax", 3): [0, 0.25, 0.75, 1, 1],
        ("budget_sparsemax", 4): [1, 1, 1, 1, 1],
        ("budget_sparsemax", 5): [1, 1, 1, 1, 1],
    }
    for (name, row), known in wanted.items():
        np.testing.assert_allclose(values[name][row, :5], known, atol=5.1e-5)


# --------------------------------------------------------------------------- exceptions
def test_entries_that_do_not_count():
    """As if they were not there, for -inf and for `where`, whatever stands there."""
    z = scores()
    ok = np.arange(CLASSES) % 3 != 0
    masked = run(np.where(ok, z, np.nan), where=ok)
    infinite = run(np.where(ok, z, -np.inf))
    alone = all_oracles(f32(z[:, ok]), f32(ALPHAS))
    for name, p in masked.items():
        assert not p[:, ~ok].any()
        np.testing.assert_allclose(p[:, ok], alone[name].astype(float), atol=1e-6)
        np.testing.assert_array_equal(p, infinite[name])


def test_exceptional_rows():
    """Empty rows are 0, NaN and +inf make a row NaN, a tie of all is uniform."""
    x = np.full((ROWS, CLASSES), -np.inf)
    x[1, :3] = [0, np.nan, 1]
    x[2, :3] = [0, np.inf, 1]
    x[3, :3] = np.inf
    x[4] = 3
    x[5, :4] = [1e4, -1e4, -1e4, 1e4]
    x[6, :3] = [-1e4, 1e4, -1e4]
    x[7, :3] = [-3e38, 3e38, 3e38]
    alpha = np.array([1, 1, 1, 1, 0.7, 0.7, 1.3, 2.0])
    values, gradients = run(x, alpha), gradients_of(x, alpha)
    for name, p in values.items():
        mass = 2 * alpha if name == "budget_sparsemax" else np.ones(ROWS)
        assert not p[0].any(), name
        assert np.isnan(p[1:4]).all(), name
        np.testing.assert_allclose(p[4], mass[4] / 9, rtol=1e-6)
        np.testing.assert_allclose(p[5, 0], p[5, 3])
        np.testing.assert_allclose(p[5, 0], mass[5] / 2, rtol=2e-3)
        np.testing.assert_allclose(p[6, 1], 1, rtol=1e-4)
        top = 1 if name == "budget_sparsemax" else 0.5
        np.testing.assert_allclose(p[7, 1:3], top, rtol=1e-5)
        count = np.isfinite(x[4:]).sum(-1)
        np.testing.assert_allclose(
            p[4:].sum(-1), np.minimum(mass[4:], count), rtol=1e-5
        )
        for gradient in gradients[name]:
            assert np.isfinite(gradient[4:]).all(), name
            assert not gradient[0].any(), name
        assert not gradients[name][0][x == -np.inf].any()


def gradients_of(x, alpha):
    args = map(np.float32, (x, alpha, scores(seed=9)))
    return jax.device_get(pulled_back(*args))


@jax.jit
def pulled_back(x, alpha, cotangent):
    p, pullback = jax.vjp(all_maps, x, alpha)
    zeros = jax.tree.map(jnp.zeros_like, p)
    return {name: pullback({**zeros, name: cotangent}) for name in p}


def test_a_budget_far_below_the_maximum():
    """Differences to the largest score would be too coarse."""
    z = np.full((ROWS, CLASSES), -np.inf)
    z[:, :5] = np.array([1e4, -1e4 + 0.5, -1e4, -1e4 - 0.25, 1e4])
    p = run(z, np.full(ROWS, 1.375))["budget_sparsemax"]
    np.testing.assert_allclose(p, oracle.budget_sparsemax(z, 2.75), atol=1e-6)


def test_axes():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    calls = {
        0: lambda x: sparsemax(x, 0),
        1: lambda x: entmax(x, 1, alpha=jnp.full((2, 4), 1.2)),
        (0, -1): lambda x: budget_sparsemax(x, (0, -1), budget=jnp.full(3, 1.2)),
        None: lambda x: normmax(x, None, alpha=jnp.float32(1.2)),
    }
    oracles = {
        0: oracle.sparsemax,
        1: lambda z: oracle.entmax(z, 1.2),
        (0, -1): lambda z: oracle.budget_sparsemax(z, 1.2),
        None: lambda z: oracle.normmax(z, 1.2),
    }
    found = jax.jit(lambda x: [call(x) for call in calls.values()])(x)
    for (axis, wanted), value in zip(oracles.items(), found, strict=True):
        axes = range(3) if axis is None else np.atleast_1d(axis)
        last = range(-len(axes), 0)
        moved = np.moveaxis(np.asarray(value), axes, last)
        rows = np.moveaxis(x, axes, last)
        size = np.prod(rows.shape[-len(axes) :])
        expected = wanted(rows.reshape(-1, size)).reshape(rows.shape)
        np.testing.assert_allclose(moved, expected.astype(float), atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 1), (1,)])
def test_small_shapes(shape):
    """No rows, no entries, one entry: the only one gets everything."""
    run = jax.jit(lambda x: (sparsemax(x), budget_sparsemax(x, budget=2.0)))
    x = np.full(shape, -7.0, np.float32)
    for value in run(x):
        np.testing.assert_array_equal(value, np.ones(shape))
    gradient = jax.jit(jax.grad(lambda x: (sparsemax(x) * 3).sum()))
    np.testing.assert_array_equal(gradient(x), np.zeros(shape))


def test_bad_parameters_make_their_rows_nan():
    bad = np.array([0, -1, np.nan, 1.5, 0.4, 1.2, -0.5, 2])
    values = run(scores(), bad)
    # alpha for entmax and, plus 1, normmax; a budget of 0 is a sum of 0.
    for name in ("entmax", "normmax", "budget_sparsemax"):
        expected = ~(bad >= 0) if name == "budget_sparsemax" else ~(bad > 0)
        np.testing.assert_array_equal(np.isnan(values[name]).all(-1), expected)
        np.testing.assert_array_equal(np.isnan(values[name]).any(-1), expected)


def test_a_row_does_not_depend_on_the_others():
    z = np.geomspace(0.01, 30, ROWS)[:, None] * scores()
    whole, reverse = run(z), run(z[::-1], ALPHAS[::-1])
    for name in NAMES:
        np.testing.assert_array_equal(whole[name], reverse[name][::-1], err_msg=name)


def test_newton_ends_on_scores_made_to_delay_it():
    """Supports that shrink by little in each step."""
    z = -np.cumsum(2.0 ** -np.arange(60))[None] * np.geomspace(1, 1e6, 7)[:, None]
    z = f32(np.concatenate([z, np.geomspace(-1e-6, -1e6, 60)[None]]))
    for function in (sparsemax, entmax15):
        p: Any = np.asarray(jax.jit(function)(z))
        wanted = getattr(oracle, function.__name__)(z)
        assert_close(p, wanted, dtype="float32", length=60)


# -------------------------------------------------------------------------- derivatives
def test_derivatives_match_differences():
    """In the scores and in the parameter, forward and reverse, in float64."""
    with jax.enable_x64():
        z, alpha = scores(std=0.7, seed=3), ALPHAS
        moves = scores(seed=1), scores(1, seed=2)[:, 0]
        cotangent = scores(seed=5)

        @jax.jit
        def compute(z, alpha, moves, cotangent):
            p, tangents = jax.jvp(all_maps, (z, alpha), moves)
            _, pullback = jax.vjp(all_maps, z, alpha)
            return tangents, pullback(dict.fromkeys(p, cotangent))

        found = jax.device_get(compute(z, alpha, moves, cotangent))
        tangents, (dz, dalpha) = found
        reverse = (dz * moves[0]).sum() + (dalpha * moves[1]).sum()
        forward = sum((tangent * cotangent).sum() for tangent in tangents.values())
        assert float(reverse) == pytest.approx(float(forward))
        for name, tangent in tangents.items():
            of_name = lambda z, alpha, name=name: all_oracles(z, alpha)[name]
            wanted = oracle.directional(of_name, (z, alpha), moves)
            np.testing.assert_allclose(tangent, wanted.astype(float), atol=1e-8)


def test_slope_in_alpha_is_exact_around_softmax():
    """The printed formula divides a difference by (alpha - 1)^2."""
    z = f32(scores())
    alpha = 1 + np.repeat([0.0, 1e-6, -1e-5, 1e-4], 2)
    cotangent = f32(scores(seed=9))
    slope = gradients_of(z, alpha)["entmax"][1]
    # By alpha at 1: -p l^2 / 2 with l = log p, without its mean.
    p = oracle.entmax(z, 1)
    moved = -p * np.log(p) ** 2 / 2
    moved = moved - p * moved.sum(-1, keepdims=True)
    np.testing.assert_allclose(slope, (cotangent * moved).sum(-1), atol=1e-3)
    exact = slice(0, 4)
    np.testing.assert_allclose(
        slope[exact], (cotangent * moved).sum(-1)[exact].astype(float), atol=2e-5
    )


def test_gradients_stay_finite_at_the_edge_for_large_alpha():
    z = scores()
    z[:, :4] = [9, 9 - 1 / 3 + 1e-6, 9 - 1 / 3, 9 - 0.1]
    for gradient in gradients_of(z, np.full(ROWS, 4.0))["entmax"]:
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "name",
    [
        "entmax",
        *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "entmax"),
    ],
)
def test_second_derivatives_are_symmetric_and_masked_gradients_zero(name):
    z = f32(scores(rows=1)[0])
    z[3] = np.nan
    where = np.arange(CLASSES) != 3

    def squares(z):
        found = all_maps(z[None], jnp.array([1.2]), where)[name]
        return (found[0] ** 2 * jnp.arange(float(CLASSES))).sum()

    both = jax.jit(lambda z: (jax.grad(squares)(z), jax.hessian(squares)(z)))
    gradient, hessian = jax.device_get(both(z))
    assert np.isfinite(gradient).all()
    assert gradient[3] == 0
    np.testing.assert_allclose(hessian, hessian.T, atol=2e-5)
    assert np.isfinite(hessian).all()
    assert not hessian[3].any()


# ----------------------------------------------------------------------------- the rest
def test_support_size():
    p = jnp.array([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(support_size(p), [2, 0, 1])
    np.testing.assert_array_equal(support_size(p, 0), [1, 1, 1])
    assert support_size(p, None).dtype == jnp.int32
    where = jnp.array([False, True, True])
    np.testing.assert_array_equal(support_size(p, where=where), [1, 0, 1])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: entmax(x, alpha=0.0), ValueError, "`alpha` must be positive"),
        (lambda x: entmax(x, alpha=jnp.ones(2)), ValueError, "`alpha` must broadcast"),
        (lambda x: entmax(x, alpha=jnp.array(2)), TypeError, "`alpha` must have a flo"),
        (lambda x: normmax(x, alpha=1.0), ValueError, "`alpha` must be above 1, got 1"),
        (lambda x: tempered_softmax(x, t=2.0), ValueError, "`t` must be finite and be"),
        (lambda x: budget_sparsemax(x, budget=-1), ValueError, "`budget` must be posi"),
        (lambda x: sparsemax(x, 2), ValueError, "`axis` must hold axes of an array wi"),
        (lambda x: entmax15(x > 0), TypeError, "`x` must have a floating dtype, got b"),
        (lambda x: sparsemax(x, where=x), TypeError, "`where` must have dtype bool"),
        (lambda x: support_size(x, (0, 0)), ValueError, "`axis` must name no axis twi"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.zeros((3, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transformations(name):
    z = jnp.asarray(scores(7, std=0.8, seed=1), jnp.float32)
    alpha = jnp.linspace(0.6, 1.9, ROWS)
    if name in ("sparsemax", "entmax15"):
        check_transformations({"sparsemax": sparsemax, "entmax15": entmax15}[name], z)
        return
    function = {
        "entmax": lambda z, alpha: entmax(z, alpha=alpha),
        "budget_sparsemax": lambda z, alpha: budget_sparsemax(z, budget=2 * alpha),
        "normmax": lambda z, alpha: normmax(z, alpha=2 + alpha),
    }[name]
    check_transformations(function, z, alpha, rows=(0, 1))
