"""The codebook head as a Flax module: fixed maps, k-means of a table, learned maps."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from softlib import losses, masked_mean
from softlib.nn import CodebookVariable, VQLogitsHead, frequency_mapping
from softlib.quantize import assign_codes
from softlib.testing import assert_close
from tests.heads import of_stored, vq_cross_entropy
from tests.host import jnp

FEATURES, CLASSES, CODES = 6, 37, 5


def batch(seed=0):
    hidden = jax.random.normal(jax.random.key(seed), (2, 5, FEATURES))
    labels = jax.random.randint(jax.random.key(seed + 1), (2, 5), 0, CLASSES)
    return hidden, labels


def loss_of(head, hidden, labels, where=None):
    return losses.softmax_cross_entropy(head(hidden), labels, where=where)


def head_of(**options):
    head = VQLogitsHead(FEATURES, CLASSES, CODES, rngs=nnx.Rngs(0), **options)
    if head.token_bias is not None:
        head.token_bias[...] = jnp.linspace(-1, 1, CLASSES)
    return head


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_loss_is_the_cross_entropy_of_the_logits(learned, biased):
    head = head_of(learn_mapping=learned, use_token_bias=biased, softcap=2.0, scale=1.5)
    hidden, labels = batch()

    @nnx.jit
    def everything(head, hidden, labels):
        logits = head(hidden).materialize()
        pairs = [
            (
                loss_of(head, hidden, labels, where=where),
                of_stored.softmax_cross_entropy(logits, labels, where=where),
            )
            for where in (None, labels % 2 == 0)
        ]
        drawn = head.sample(jax.random.key(0), hidden, temperature=0.5)
        return logits, pairs, drawn

    logits, pairs, drawn = everything(head, hidden, labels)
    assert logits.shape == (2, 5, CLASSES)
    for loss, wanted in pairs:
        assert_close(loss, wanted, dtype="float32", length=CLASSES)
    assert drawn.shape == (2, 5)


def test_parameters_are_the_codebook_and_the_bias():
    size = lambda head: sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(head, nnx.Param))
    )
    assert size(head_of()) == CODES * FEATURES
    assert size(head_of(use_token_bias=True)) == CODES * FEATURES + CLASSES
    assert size(head_of(learn_mapping=True)) == CLASSES * FEATURES
    state = nnx.state(head_of(), CodebookVariable)
    (mapping,) = jax.tree.leaves(state)
    sizes = np.bincount(mapping, minlength=CODES)
    assert sizes.max() - sizes.min() <= 1
    assert (mapping != jnp.arange(CLASSES) % CODES).any()


def test_training_a_fixed_map_reaches_its_floor_and_a_bias_the_frequencies():
    """Labels that do not depend on the hidden state, frequent ones more often."""
    counts = jnp.arange(CLASSES, 0, -1) ** 2
    mapping = frequency_mapping(counts, CODES, num_singletons=2)
    p = counts / counts.sum()
    labels = jax.random.choice(jax.random.key(0), CLASSES, (4000,), p=p)
    seen = np.bincount(labels, minlength=CLASSES) / 4000
    hidden = jnp.ones((4000, FEATURES))
    own = np.asarray(mapping)
    share = np.bincount(own, weights=seen)
    sizes = np.bincount(own)
    floor = -(share * np.log(np.where(share > 0, share / sizes, 1))).sum()
    entropy = -(seen * np.log(np.where(seen > 0, seen, 1))).sum()
    for biased, wanted in ((False, floor), (True, entropy)):
        head = head_of(mapping=mapping, use_token_bias=biased)
        value = train(head, hidden, labels, steps=150)
        assert abs(value - wanted) < 0.01
    assert floor > entropy + 0.03


def train(head, hidden, labels, steps, rate=0.1, update=None):
    optimizer = nnx.Optimizer(head, optax.adam(rate), wrt=nnx.Param)

    @nnx.jit
    def step(head, optimizer):
        def loss(head):
            value = masked_mean(loss_of(head, hidden, labels))
            if head.embedding is not None:
                return value + 0.25 * head.commitment_loss(), value
            return value, value

        (_, value), gradient = nnx.value_and_grad(loss, has_aux=True)(head)
        optimizer.update(head, gradient)
        if update is not None:
            head.update_codebook(**update)
        return value

    return [float(step(head, optimizer)) for _ in range(steps)][-1]


# ------------------------------------------------------------------------------ tables
def test_a_table_of_few_distinct_rows_is_kept_exactly():
    codes = jax.random.normal(jax.random.key(1), (CODES, FEATURES))
    own = jnp.arange(CLASSES) % CODES
    table = codes[own]
    head = VQLogitsHead.from_table(
        table, CODES, num_steps=5, rngs=nnx.Rngs(0), use_token_bias=True
    )
    hidden, labels = batch()
    wanted = losses.linear_softmax_cross_entropy(hidden, table, labels)
    assert_close(loss_of(head, hidden, labels), wanted, dtype="float32", length=CLASSES)


def test_weights_of_a_table_make_the_codes_of_frequent_tokens_finer():
    table = jax.random.normal(jax.random.key(1), (CLASSES, FEATURES))
    frequent = jnp.arange(CLASSES) < 5
    weights = jnp.where(frequent, 1000.0, 1.0)

    def error(head):
        rows = head.codebook[...][head.mapping[...]]
        return float(jnp.square(rows - table).sum(1)[frequent].mean())

    build = lambda **options: VQLogitsHead.from_table(
        table, CODES, rngs=nnx.Rngs(0), **options
    )
    assert error(build(weights=weights)) < 0.5 * error(build())


# ------------------------------------------------------------------------ learned maps
def test_the_gradient_goes_straight_through_to_the_embeddings():
    head = head_of(learn_mapping=True, softcap=3.0)
    hidden, labels = batch()
    gradient = nnx.grad(lambda head: loss_of(head, hidden, labels).sum())(head)
    (found,) = jax.tree.leaves(gradient)
    table = head.codebook[...][head.mapping[...]]
    wanted = jax.grad(
        lambda table: losses.linear_softmax_cross_entropy(
            hidden, table, labels, softcap=3.0
        ).sum()
    )(table)
    assert_close(found, wanted, dtype="float32", length=CLASSES)


def test_commitment_pulls_the_embeddings_to_their_codes_alone():
    head = head_of(learn_mapping=True)
    assert head.embedding is not None
    embedding, codes = head.embedding[...], head.codebook[...][head.mapping[...]]
    value, gradient = nnx.value_and_grad(lambda head: head.commitment_loss())(head)
    assert_close(
        value, jnp.square(embedding - codes).mean(), dtype="float32", length=222
    )
    (found,) = jax.tree.leaves(gradient)
    wanted = 2 * (embedding - codes) / embedding.size
    assert_close(found, wanted, dtype="float32", length=1)


def test_updates_assign_anew_and_bring_codes_nearer():
    head = head_of(learn_mapping=True)
    assert head.embedding is not None
    errors = []
    for _ in range(4):
        head.update_codebook(decay=0)
        errors.append(float(head.commitment_loss()))
    assert errors[0] > errors[1] > errors[-1]
    nearest = assign_codes(head.embedding[...], head.codebook[...])
    head.update_codebook(decay=1)
    np.testing.assert_array_equal(head.mapping[...], nearest)


def test_a_learned_map_finds_the_tokens_that_go_together():
    """Five hidden states, each with labels of its own set: the sets become the codes.

    The random map it starts from mixes them; that one's loss is far above.
    """
    group = jax.random.permutation(jax.random.key(5), jnp.arange(CLASSES) % CODES)
    kind = jnp.arange(1200) % CODES
    noise = jax.random.gumbel(jax.random.key(6), (1200, CLASSES))
    within = jnp.where(group[None] == kind[:, None], noise, -jnp.inf)
    labels = within.argmax(1)
    hidden = jax.nn.one_hot(kind, FEATURES)
    sizes = jnp.bincount(group, length=CODES)
    ideal = float(jnp.log(sizes[kind]).mean())
    random_map = train(head_of(), hidden, labels, steps=100)
    learned = head_of(learn_mapping=True)
    train(learned, hidden, labels, steps=100, rate=0.05, update={"decay": 0.9})
    fixed = learned.fixed()
    np.testing.assert_allclose(
        loss_of(fixed, hidden, labels),
        loss_of(learned, hidden, labels),
        rtol=1e-4,
        atol=1e-5,
    )
    assert fixed.embedding is None
    value = train(fixed, hidden, labels, steps=60)
    # Not all the way: a code that no token is near at the start stays without one.
    assert value < (ideal + random_map) / 2
    assert random_map > ideal + 0.5


def test_dtype_is_that_of_the_products():
    hidden, labels = batch()
    for learned in (False, True):
        head = head_of(dtype=jnp.bfloat16, learn_mapping=learned)
        loss = loss_of(head, hidden, labels)
        assert loss.dtype == jnp.float32
        cast = (hidden.astype(jnp.bfloat16), head.codebook[...].astype(jnp.bfloat16))
        wanted = vq_cross_entropy(*cast, head.mapping[...], labels)
        assert_close(loss, wanted, dtype="float32", length=CLASSES)
        gradient = nnx.grad(lambda head: loss_of(head, hidden, labels).mean())(head)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}


def test_errors_say_what_is_missing():
    with pytest.raises(ValueError, match=r"`mapping` must have shape \(37,\)"):
        head_of(mapping=jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"codes in \[0, 5\), got 5"):
        head_of(mapping=jnp.full(CLASSES, 5))
    for call in (lambda h: h.update_codebook(), lambda h: h.commitment_loss()):
        with pytest.raises(ValueError, match="`learn_mapping` must be True, got False"):
            call(head_of())
