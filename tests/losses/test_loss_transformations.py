"""Every public function through the battery, and in the loops that users write."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import softlib
from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests.heads import of_head, of_stored
from tests.host import jnp
from tests.oracles.cross_entropy import token_metrics

ROWS, FEATURES, CLASSES = 8, 3, 7
CROSS_ENTROPY: Any = losses.linear_softmax_cross_entropy
LABELS = jnp.arange(ROWS) % CLASSES
CUSTOM = {"forward_mode": "the streamed statistics have a custom_vjp"}


def arrays(seed=0):
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    return {
        "hidden": draw(ROWS, FEATURES),
        "weight": draw(CLASSES, FEATURES),
        "bias": draw(CLASSES),
        "scale": jnp.abs(draw(ROWS)) + 0.5,
        "temperature": jnp.abs(draw()) + 0.5,
        "where": jnp.arange(ROWS) != 3,
        "class_where": jnp.arange(CLASSES) != 2,
        "logits": draw(ROWS, CLASSES),
    }


def statistics(implementation, names, hidden, weight, labels, bias, scale, temperature):
    got = of_head.row_statistics(
        hidden,
        weight,
        labels,
        bias=bias,
        scale=scale,
        softcap=4.0,
        temperature=temperature,
        vocab_chunk=3,
        statistics=names,
        implementation=implementation,
    )
    return jax.tree.leaves(got)


SOME = ("lse", "label_logits", "mean_logit")
MORE = (*SOME, "sum_logits", "sum_squared_logits", "argmax")


@pytest.mark.parametrize(
    ("implementation", "names"),
    # The others are sums beside these in the same passes.
    [
        (None, SOME),
        pytest.param(None, MORE, marks=pytest.mark.slow),
        pytest.param("reference", MORE, marks=pytest.mark.slow),
    ],
)
def test_linear_row_statistics(implementation, names):
    a = arrays()
    labels = jnp.stack([LABELS, (LABELS + 3) % CLASSES], axis=1)
    check_transformations(
        functools.partial(statistics, implementation, names),
        *(a["hidden"], a["weight"], labels, a["bias"], a["scale"], a["temperature"]),
        rows=(0, 2, 4),
        skip={} if implementation == "reference" else CUSTOM,
    )


def test_row_statistics():
    a = arrays()

    def function(logits, labels, bias, class_where):
        got = of_stored.row_statistics(
            logits,
            labels,
            bias=bias,
            class_where=class_where,
            statistics=("lse", "label_logits", "mean_logit", "sum_squared_logits"),
        )
        return jax.tree.leaves(got)

    check_transformations(
        function,
        *(a["logits"], LABELS, a["bias"], a["class_where"]),
        rows=(0, 1),
        skip=CUSTOM,
    )


@pytest.mark.slow  # a composition on linear_row_statistics
@pytest.mark.parametrize("vocab_axis", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_linear_softmax_cross_entropy(vocab_axis):
    a = arrays()

    def function(hidden, weight, labels, bias, where, class_where):
        return losses.linear_softmax_cross_entropy(
            hidden,
            weight,
            labels,
            vocab_axis=vocab_axis,
            bias=bias,
            label_smoothing=0.1,
            logsumexp_penalty=0.1,
            class_where=class_where,
            where=where,
            return_lse=True,
            vocab_chunk=3,
        )

    # Labels among the selected classes, also of the rolled versions: +inf has no slope.
    check_transformations(
        function,
        a["hidden"],
        a["weight"].T if vocab_axis else a["weight"],
        jnp.full(ROWS, 5),
        a["bias"],
        a["where"],
        a["class_where"],
        rows=(0, 2, 4),
        skip=CUSTOM,
    )


@pytest.mark.slow  # row_statistics goes the same way
def test_softmax_token_metrics():
    """All the numbers of the other losses at once."""
    a = arrays()

    def function(logits, labels, where):
        got = of_stored.token_metrics(
            logits,
            labels,
            where=where,
            softcap=3.0,
            metrics=softlib.logits.TokenMetrics._fields,
        )
        return jax.tree.leaves(got)

    check_transformations(
        function,
        *(a["logits"], LABELS, a["where"]),
        rows=(0, 1, 2),
        skip=CUSTOM,
    )


@pytest.mark.slow  # several of the losses here from one stream
def test_linear_token_metrics():
    a = arrays()

    def function(hidden, weight, labels):
        got = of_head.token_metrics(
            hidden,
            weight,
            labels,
            vocab_chunk=3,
            metrics=("log_prob", "entropy", "correct"),
        )
        return jax.tree.leaves(got)

    check_transformations(
        function, a["hidden"], a["weight"], LABELS, rows=(0, 2), skip=CUSTOM
    )


# --------------------------------------------------------------------- forward, second
def test_forward_mode_of_the_reference():
    a = arrays()
    loss = functools.partial(CROSS_ENTROPY, implementation="reference")
    run = lambda w: loss(a["hidden"], w, LABELS)
    tangent = jnp.ones_like(a["weight"]).at[0].set(3.0)
    _, slope = jax.jit(lambda w: jax.jvp(run, (w,), (tangent,)))(a["weight"])
    gradient = jax.jit(jax.jacrev(run))(a["weight"])
    assert_close(
        slope, (gradient * tangent[None]).sum((1, 2)), dtype=jnp.float32, length=21
    )


def test_hessian_vector_products_both_ways_equal_the_dense_hessian():
    a = arrays()

    def total(w, implementation=None):
        loss, lse = CROSS_ENTROPY(
            a["hidden"],
            w,
            LABELS,
            return_lse=True,
            softcap=2.0,
            vocab_chunk=3,
            implementation=implementation,
        )
        return (loss**2 + 0.1 * lse**2).sum()

    w, t = a["weight"], jnp.cos(jnp.arange(21.0)).reshape(CLASSES, FEATURES)
    forward = jax.jit(lambda w, t: jax.jvp(jax.grad(total), (w,), (t,))[1])
    reverse = jax.jit(jax.grad(lambda w, t: (jax.grad(total)(w) * t).sum()))
    dense = jax.jit(jax.hessian(functools.partial(total, implementation="reference")))(
        w
    )
    wanted = jnp.tensordot(dense, t, 2)
    for product in (forward, reverse):
        assert_close(product(w, t), wanted, dtype=jnp.float32, length=21, c=8)


# --------------------------------------------------------------- what users do with it
def test_partial_application():
    a = arrays()
    loss = functools.partial(CROSS_ENTROPY, softcap=2.0, vocab_chunk=3)
    direct = CROSS_ENTROPY(a["hidden"], a["weight"], LABELS, softcap=2.0, vocab_chunk=3)
    got = jax.jit(loss)(a["hidden"], a["weight"], LABELS)
    assert_close(got, direct, dtype=jnp.float32, length=7)


def test_inside_scan_over_layers_with_checkpoint():
    a = arrays()

    def total(scale, remat):
        def layer(hidden, s):
            block = lambda h, s: CROSS_ENTROPY(
                h * s, a["weight"], LABELS, vocab_chunk=3
            )
            block = jax.checkpoint(block) if remat else block
            return hidden, block(hidden, s)

        return jax.lax.scan(layer, a["hidden"], scale)[1].sum()

    scale = jnp.array([0.5, 1.0, 2.0])
    plain, remat = (
        jax.jit(jax.value_and_grad(functools.partial(total, remat=r)))(scale)
        for r in (False, True)
    )
    for one, two in zip(remat, plain, strict=True):
        assert_close(one, two, dtype=jnp.float32, length=24)
    for i, s in enumerate(scale):
        wanted = token_metrics(
            LABELS,
            hidden=a["hidden"] * s,
            weight=a["weight"],
            cotangents={"loss": np.ones(ROWS)},
        ).gradients["hidden"]
        slope = (wanted * np.asarray(a["hidden"])).sum()
        assert_close(plain[1][i], slope, dtype=jnp.float32, length=24)


def test_an_optax_loop_learns_and_follows_the_loss_of_stored_logits():
    a = arrays()
    optimizer = optax.adam(0.1)

    def train(loss):
        @jax.jit
        def step(parameters, state):
            value, gradient = jax.value_and_grad(lambda p: loss(p).mean())(parameters)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(parameters, updates), state, value

        parameters, state, values = a["weight"], optimizer.init(a["weight"]), []
        for _ in range(20):
            parameters, state, value = step(parameters, state)
            values.append(float(value))
        return values

    ours = train(lambda w: CROSS_ENTROPY(a["hidden"], w, LABELS, vocab_chunk=3))
    naive = train(
        lambda w: optax.softmax_cross_entropy_with_integer_labels(
            a["hidden"] @ w.T, LABELS
        )
    )
    np.testing.assert_allclose(ours, naive, rtol=1e-3)
    assert ours[-1] < 0.7 * ours[0]


def test_nnx_jit_with_a_tied_embedding():
    """The embedding is read at the input and at the output: both gradients add up."""
    model = nnx.Embed(CLASSES, FEATURES, rngs=nnx.Rngs(0))
    inputs, labels = jnp.arange(6), (jnp.arange(6) + 1) % CLASSES

    def loss(model, stored):
        hidden, table = model(inputs), model.embedding[...]
        if stored:
            return optax.softmax_cross_entropy_with_integer_labels(
                hidden @ table.T, labels
            ).mean()
        return CROSS_ENTROPY(hidden, table, labels, vocab_chunk=3).mean()

    run = nnx.jit(nnx.value_and_grad(loss), static_argnums=1)
    for one, two in zip(
        *(jax.tree.leaves(run(model, stored)) for stored in (False, True)), strict=True
    ):
        assert_close(one, two, dtype=jnp.float32, length=7)


def test_vmap_over_a_leading_axis_of_every_argument():
    """An ensemble of heads; the rows differ too."""
    several = [arrays(seed) for seed in range(3)]
    stack = lambda name: jnp.stack([a[name] for a in several])

    def total(hidden, weight, bias, labels):
        loss = CROSS_ENTROPY(hidden, weight, labels, bias=bias, vocab_chunk=3)
        return (loss**2).sum()

    labels = jnp.stack([LABELS, LABELS[::-1], (LABELS + 2) % CLASSES])
    run = jax.value_and_grad(total, (0, 1, 2))
    batched = jax.jit(jax.vmap(run))(
        stack("hidden"), stack("weight"), stack("bias"), labels
    )
    single = jax.jit(run)
    for i, a in enumerate(several):
        wanted = single(a["hidden"], a["weight"], a["bias"], labels[i])
        for one, two in zip(*map(jax.tree.leaves, (batched, wanted)), strict=True):
            assert_close(one[i], two, dtype=jnp.float32, length=21, c=8)


def test_shapes_alone_are_enough_to_trace():
    loss = jax.eval_shape(
        CROSS_ENTROPY,
        jax.ShapeDtypeStruct((8192, 2304), jnp.bfloat16),
        jax.ShapeDtypeStruct((256003, 2304), jnp.bfloat16),
        jax.ShapeDtypeStruct((8192,), jnp.int32),
    )
    assert (loss.shape, loss.dtype) == ((8192,), jnp.float32)
