"""Gumbel-softmax flow matching: vectors, the flow's properties, loss, sampling."""

import functools
import itertools
import pathlib

import jax
import numpy as np
import optax
import pytest

from softlib import decoding
from softlib.softmax import concrete_log_prob, softmax, straight_through_one_hot
from softlib.testing import assert_close
from tests.compiled import compiled
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data"
KEY = jax.random.key(0)
INF = float("inf")
gumbel_flow_loss = compiled(decoding.gumbel_flow_loss)
gumbel_flow_velocity = compiled(decoding.gumbel_flow_velocity)
interpolant = compiled(decoding.gumbel_softmax_interpolant)
sample = compiled(decoding.sample_gumbel_flow)


@pytest.fixture(scope="module")
def vectors():
    with np.load(DATA / "gumbel_softmax_flow_case0.npz") as data:
        return dict(data)


def test_vectors(vectors):
    with jax.enable_x64(True):
        of = lambda name: jnp.asarray(vectors[name])
        time = of("in_t")[..., 0]  # (3, 1), for (3, 4) positions
        given = {"tau_max": 10.0, "decay": 3.0}
        path = functools.partial(interpolant, None, of("in_x1"), beta=2.0, **given)
        along = lambda t: path(t, noise=of("in_gumbel"))
        x, velocity = jax.jvp(along, (time,), (jnp.ones_like(time),))
        np.testing.assert_allclose(x, vectors["out_xt"], rtol=1e-13)
        exact = vectors["out_velocity_with_noise"]
        np.testing.assert_allclose(velocity, exact, atol=1e-14)
        towards = lambda p: gumbel_flow_velocity(x, p, time, **given)
        noisy = of("in_x1") + of("in_gumbel") / 2
        np.testing.assert_allclose(towards(noisy), exact, atol=1e-14)
        conditional = towards(of("in_x1"))
        np.testing.assert_allclose(
            conditional, vectors["out_conditional_velocity"], atol=1e-14
        )
        marginal = towards(of("in_denoiser_probs"))
        np.testing.assert_allclose(
            marginal, vectors["out_marginal_velocity"], atol=1e-14
        )
        _, pull = jax.vjp(
            lambda z: straight_through_one_hot(softmax(z)), of("in_logits")
        )
        (slopes,) = pull(of("in_onehot_grad"))
        np.testing.assert_allclose(slopes, vectors["out_st_grad"], atol=1e-14)


def test_without_noise_the_path_follows_the_conditional_field():
    x1 = jnp.eye(4)[:3]
    along = lambda t: interpolant(KEY, x1, t, beta=INF)
    time = jnp.float32(0.6)
    x, velocity = jax.jvp(along, (time,), (jnp.float32(1),))
    field = gumbel_flow_velocity(x, x1, time)
    assert_close(velocity, field, dtype="float32", length=4)


def test_symbol_is_the_largest_entry_as_often_as_the_rule_of_gumbel_says():
    for classes, beta in ((5, 2.0), (20, 2.0), (4, 0.5)):
        x1 = jnp.tile(jnp.eye(classes)[1], (20_000, 1))
        x = interpolant(KEY, x1, 0.7, beta=beta)
        share = float((x.argmax(-1) == 1).mean())
        expected = np.exp(beta) / (np.exp(beta) + classes - 1)
        assert share == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_points_sum_to_one_and_velocities_to_zero(dtype):
    x1 = jnp.eye(6, dtype=dtype)[None]
    time = jnp.array([[0.1]])
    x = interpolant(KEY, x1, time)
    p = softmax(jnp.asarray(np.random.default_rng(0).normal(size=x.shape), dtype))
    u = gumbel_flow_velocity(x, p, time)
    assert x.dtype == u.dtype == dtype
    assert_close(x.astype("f4").sum(-1), np.ones((1, 6)), dtype=dtype, length=6)
    assert_close(u.astype("f4").sum(-1), np.zeros((1, 6)), dtype=dtype, length=6)
    vertices = gumbel_flow_velocity(x1, p, time)
    assert not vertices.any()
    hot = interpolant(KEY, x1, 1.0, tau_max=1e-6)
    assert jnp.isfinite(hot).all()


def test_flow_gains_the_documented_log_odds():
    time = jnp.linspace(0, 1, 2001)
    speed = 3.0 / decoding.exponential_temperature(time)
    gained = float(((speed[1:] + speed[:-1]) / 2).mean())
    assert gained == pytest.approx((np.exp(3) - 1) / 10, rel=1e-4)
    assert gained == pytest.approx(1.9, abs=0.02)


# ------------------------------------------------------------------------------ loss
def test_loss_of_ids_one_hot_and_distributions():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(2, 3, 4)) * 3, "float32")
    labels = jnp.asarray(rng.integers(0, 4, (2, 3)))
    ids = gumbel_flow_loss(logits, labels)
    assert ids.dtype == jnp.float32
    hot = gumbel_flow_loss(logits, jnp.eye(4)[labels])
    assert_close(hot, ids, dtype="float32", length=4)
    x1 = softmax(jnp.asarray(rng.normal(size=logits.shape), "float32"))
    mixed = gumbel_flow_loss(logits, x1)
    p = np.exp(np.asarray(logits, np.float64))
    p = p / p.sum(-1, keepdims=True)
    expected = -np.log((p * np.asarray(x1)).sum(-1))
    assert_close(mixed, expected, dtype="float32", length=4)


def test_loss_of_padding_extremes_and_its_gradient():
    logits = jnp.array([[jnp.nan] * 3, [500.0, 0, -500], [1.0, 2, 3]])
    where = jnp.array([False, True, True])
    for labels in (jnp.array([9, 2, 0]), jnp.eye(3)[jnp.array([0, 2, 0])]):
        call = lambda z, labels=labels: gumbel_flow_loss(z, labels, where=where).sum()
        loss = gumbel_flow_loss(logits, labels, where=where)
        assert loss[:2].tolist() == [0, 1000]
        slopes = jax.jit(jax.grad(call))(logits)
        last = np.asarray(softmax(logits[2])) - [1, 0, 0]
        expected = np.stack([np.zeros(3), np.array([1, 0, -1]), last])
        assert_close(slopes, expected, dtype="float32", length=3)
    assert (
        gumbel_flow_loss(logits.astype("bfloat16"), jnp.zeros(3, int)).dtype
        == "float32"
    )


# ---------------------------------------------------------------------------- sampling
WORDS = np.array([[0, 1, 2, 3, 4, 0, 1, 2], [4, 3, 2, 1, 0, 4, 3, 2]])


def denoise_exactly(x, t, beta=2.0):
    """Logits of p(symbol | x_t) if a sequence is one of the words with equal chance."""
    tau = decoding.exponential_temperature(t)
    hot = jnp.eye(5)[WORDS]
    logits = jnp.broadcast_to(beta * hot[:, None], (2, *x.shape))
    log_x = jnp.broadcast_to(jnp.log(jnp.maximum(x, 1e-30))[None], logits.shape)
    density = concrete_log_prob(log_x, logits, temperature=beta * tau).sum(-1)
    weight = softmax(density, axis=0)
    return jnp.log(jnp.einsum("wb,wlv->blv", weight, hot) + 1e-9)


@pytest.fixture(scope="module")
def drawn():
    """Samples of the exact denoiser by guidance scale and space."""
    score = lambda h: jnp.einsum("blv,lv->b", h, jnp.eye(5)[WORDS[1]])

    @functools.partial(jax.jit, static_argnames=("space", "guided"))
    def sample(scale, space, guided):
        return decoding.sample_gumbel_flow(
            KEY,
            denoise_exactly,
            (200, 8, 5),
            num_steps=20,
            guidance=score if guided else None,
            guidance_scale=scale,
            guidance_top_k=4,
            space=space,
        )

    return sample


def shares(tokens):
    return [(np.asarray(tokens) == word).all(-1).mean() for word in WORDS]


@pytest.mark.parametrize("space", ["logit", "simplex"])
def test_samples_are_the_words_of_the_denoiser_and_guidance_chooses(drawn, space):
    free = drawn(0.0, space, False)
    assert free.tokens.dtype == jnp.int32
    assert free.state.shape == free.probs.shape == (200, 8, 5)
    assert_close(free.state.sum(-1), np.ones((200, 8)), dtype="float32", length=5)
    assert (free.state >= 0).all()
    one, two = shares(free.tokens)
    assert one + two > 0.95
    assert 0.35 < two < 0.65
    # On the simplex guidance fades as the denoiser becomes certain: here at once.
    scale, least = {"logit": (2.0, 0.95), "simplex": (50.0, 0.65)}[space]
    assert shares(drawn(scale, space, True).tokens)[1] > least
    assert shares(drawn(-scale, space, True).tokens)[0] > least


def test_both_spaces_agree_in_the_limit_of_many_steps():
    fixed = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    draw = functools.partial(sample, KEY, lambda x, t: fixed, (1, 3))
    exact = draw(num_steps=1).state
    for space, steps, error in (("logit", 50, 1e-6), ("simplex", 500, 3e-3)):
        state = draw(num_steps=steps, space=space).state
        np.testing.assert_allclose(state, exact, atol=error)
    gain = (np.exp(3) - 1) / 10
    noise = jax.random.gumbel(jax.random.split(KEY, 3)[0], (1, 3)) / 20
    expected = softmax(noise + gain * jnp.exp(fixed))
    np.testing.assert_allclose(exact, expected, atol=1e-6)


def test_simplex_is_kept_for_many_steps_of_strong_guidance():
    score = lambda h: h[..., 0].sum()
    for space in ("logit", "simplex"):
        draw = sample(
            KEY,
            lambda x, t: 30 * (x - 0.3),
            (5, 4),
            num_steps=200,
            guidance=score,
            guidance_scale=1e4,
            num_guidance_samples=2,
            step_temperature=0.5,
            space=space,
        )
        assert (draw.state >= 0).all()
        assert_close(draw.state.sum(-1), np.ones(5), dtype="float32", length=4)
        assert jnp.isfinite(draw.probs).all()


def test_step_noise_changes_with_the_key_and_beta_infinite_starts_at_the_centre():
    seen = []

    def denoiser(x, t):
        jax.debug.callback(lambda x, t: seen.append((float(t), np.array(x))), x, t)
        return jnp.zeros((2, 3), "bfloat16")

    draw = lambda key, **options: decoding.sample_gumbel_flow(
        key, denoiser, (2, 3), num_steps=4, beta=INF, **options
    )
    plain = draw(KEY)
    jax.effects_barrier()
    assert sorted({t for t, _ in seen}) == [0, 0.25, 0.5, 0.75, 1]
    assert all((x == np.float32(1 / 3)).all() for _, x in seen)
    noisy = [draw(k, step_temperature=1.0).state for k in jax.random.split(KEY)]
    assert (noisy[0] != noisy[1]).any()
    assert plain.probs.dtype == jnp.float32


@pytest.mark.slow
def test_a_trained_denoiser_draws_its_motifs_and_guidance_chooses_one():
    words, hot = jnp.asarray(WORDS), jnp.eye(5)[WORDS]
    sizes = (8 * 5 + 1, 128, 128, 8 * 5)
    keys = jax.random.split(KEY, 4)
    params = [
        (jax.random.normal(k, (m, n)) * m**-0.5, jnp.zeros(n))
        for k, (m, n) in zip(keys, itertools.pairwise(sizes), strict=False)
    ]

    def denoiser(params, x, t):
        tau = decoding.exponential_temperature(t)
        z = jnp.log(jnp.maximum(x, 1e-9)) * tau[:, None, None]
        h = jnp.concatenate([z.reshape(len(x), -1), t[:, None]], -1)
        for i, (w, b) in enumerate(params):
            h = jnp.dot(h, w) + b[None]
            h = jax.nn.gelu(h) if i < 2 else h
        return h.reshape(x.shape)

    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state, key):
        which_key, time_key, noise_key = jax.random.split(key, 3)
        which = jax.random.randint(which_key, (256,), 0, 2)
        t = jax.random.uniform(time_key, (256,))
        x = interpolant(noise_key, hot[which], t[:, None])

        def loss(params):
            logits = denoiser(params, x, t)
            return gumbel_flow_loss(logits, words[which]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in jax.random.split(keys[3], 1500):
        params, state = step(params, state, key)
    score = lambda h: jnp.einsum("blv,lv->b", h, hot[1])
    draw = functools.partial(
        decoding.sample_gumbel_flow,
        KEY,
        lambda x, t: denoiser(params, x, jnp.full(len(x), t)),
        (500, 8, 5),
        num_steps=40,
    )
    free = draw().tokens
    assert sum(shares(free)) > 0.9
    assert min(shares(free)) > 0.2
    steered = draw(guidance=score, guidance_scale=2.0).tokens
    assert shares(steered)[1] > 0.95


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: interpolant(None, jnp.eye(2), 0.5),
            TypeError,
            "`key` or `noise` must be given",
        ),
        (
            lambda: interpolant(KEY, jnp.eye(2), jnp.ones(3)),
            ValueError,
            "`t` must broadcast",
        ),
        (
            lambda: gumbel_flow_velocity(jnp.eye(2), jnp.eye(3), 0.5),
            ValueError,
            "`target_probs` must have shape",
        ),
        (
            lambda: decoding.exponential_temperature(0.5, tau_max=-1.0),
            ValueError,
            "`tau_max` must be positive",
        ),
        (
            lambda: gumbel_flow_loss(jnp.eye(2), jnp.eye(3)),
            ValueError,
            "`labels` must have shape",
        ),
        (
            lambda: decoding.sample_gumbel_flow(
                KEY, lambda x, t: x[0], (2, 3), num_steps=1
            ),
            ValueError,
            r"`denoiser\(x, t\)` must have shape \(2, 3\)",
        ),
        (
            lambda: decoding.sample_gumbel_flow(
                KEY, lambda x, t: x, (2, 3), num_steps=0
            ),
            ValueError,
            "`num_steps` must be at least 1",
        ),
        (
            lambda: decoding.sample_gumbel_flow(KEY, lambda x, t: x, (), num_steps=1),
            ValueError,
            "`shape` must hold sizes",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
