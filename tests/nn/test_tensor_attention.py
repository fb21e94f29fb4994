"""The layer of tensor attention against the dense oracle, and what its options mean."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from softlib import masks
from softlib.attention import dot_product_attention
from softlib.masks import Block
from softlib.nn import _tensor_attention
from softlib.nn._tensor_attention import TensorAttention
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles.kronecker import kronecker_attention as dense

D, T, HEADS = 8, 5, 4


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def made(**options) -> Any:
    """A layer whose parameters are all drawn, so that no blank is 1 and no bias 0."""
    make = lambda: TensorAttention(D, HEADS, **options, rngs=nnx.Rngs(0))
    # NumPy draws, because the initialisers would be compiled shape by shape.
    layer, rng = nnx.eval_shape(make), np.random.default_rng(7)
    drawn = lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype)
    nnx.update(layer, jax.tree.map(drawn, nnx.state(layer)))
    return layer


@nnx.jit
def call(layer, inputs, inputs_kv=None, mask=None):
    return layer(inputs, inputs_kv, mask=mask)


@nnx.jit
def weights_of(layer, inputs, inputs_kv=None, mask=None):
    return layer.attention_weights(inputs, inputs_kv, mask=mask)


def wide(x):
    return np.asarray(x, np.float64)


def projected(linear, x):
    found = np.einsum("btd,dnh->btnh", wide(x), wide(linear.kernel[...]))
    return found if linear.bias is None else found + wide(linear.bias[...])


def expected_of(layer, inputs, sources, allowed=True, scale=None):
    """Outputs and weights; `allowed` as the oracle takes it, blanks included."""

    def axes(linears, blanks):
        heads = [projected(f, x) for f, x in zip(linears, sources, strict=True)]
        if blanks is None:
            return tuple(heads)
        first = [
            np.broadcast_to(wide(blank), (len(x), 1, *blank.shape))
            for blank, x in zip(blanks[...], heads, strict=True)
        ]
        return tuple(
            np.concatenate(pair, axis=1) for pair in zip(first, heads, strict=True)
        )

    found = dense(
        projected(layer.query, inputs),
        axes(layer.keys, layer.blank_keys),
        axes(layer.values, layer.blank_values),
        allowed=allowed,
        scale=scale,
    )
    out = np.einsum("btnh,nhd->btd", found.out, wide(layer.out.kernel[...]))
    if layer.out.bias is not None:
        out = out + wide(layer.out.bias[...])
    return out, found.weights


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pairwise": {"order": 2, "scale": 0.7},
    "four_grouped": {"order": 4, "num_key_heads": 2, "head_features": 3},
    "blank_bias": {"blank_key": True, "use_bias": True, "value_features": 3},
    "cross": {"num_key_heads": 1, "kv_features": (3, 6), "blank_key": True},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_the_oracle(name):
    options = LAYERS[name]
    with jax.enable_x64():
        layer = made(param_dtype=jnp.float64, **options)
        x = draw(2, T, D, dtype=jnp.float64)
        sources, given = (x,) * (layer.order - 1), None
        if name == "cross":
            sources = given = tuple(
                draw(2, n, size, seed=n, dtype=jnp.float64)
                for n, size in zip((4, 7), options["kv_features"], strict=True)
            )
        found = call(layer, x, given)
        weights = weights_of(layer, x, given)
        out, expected = expected_of(layer, x, sources, scale=options.get("scale"))
    assert_close(found, out, dtype="float64", length=T**3 * D)
    assert weights.shape == expected.shape
    assert_close(weights, expected, dtype="float64", length=T**3)
    axes = tuple(range(3, weights.ndim))
    np.testing.assert_allclose(np.asarray(weights).sum(axes), 1, rtol=1e-12)


def test_order_two_is_ordinary_attention():
    layer = made(order=2, num_key_heads=2, scale=2**-0.5)
    x = draw(2, T, D)
    attended = dot_product_attention(
        layer.query(x), layer.keys[0](x), layer.values[0](x), mask=masks.Causal()
    )
    found = call(layer, x, mask=masks.Causal())
    assert_close(found, layer.out(attended), dtype="float32", length=T * D)


# ------------------------------------------------------------------------------- masks
def no_third(query, *keys):
    return (query + sum(keys)) % 3 != 0


def before(i, j):
    return j <= i


# A mask, and what it says of the tokens at some of the axes (query, key 1, key 2).
MASKS: dict[str, Any] = {
    "causal": (masks.Causal(), {(0, 1): before, (0, 2): before}),
    "one axis": (
        masks.PerAxis(masks.Window(2, 0), None),
        {(0, 1): lambda i, j: i - 2 <= j <= i},
    ),
    "keys": (
        masks.PerAxis(
            masks.Causal(), None, joint=masks.Between(2, 1, masks.Causal(-1))
        ),
        {(0, 1): before, (2, 1): lambda k, j: j < k},
    ),
    "query first": (
        masks.PerAxis(None, None, joint=masks.Between(0, 2, masks.Chunked(2))),
        {(0, 2): lambda i, k: i // 2 == k // 2},
    ),
    "query last": (
        masks.PerAxis(None, None, joint=masks.Between(1, 0, masks.Causal(-1))),
        {(1, 0): lambda j, i: i < j},
    ),
    "function": (
        masks.PerAxis(masks.Causal(), masks.Causal(1), joint=no_third),
        {(0, 1): before, (0, 2): lambda i, k: k <= i + 1, (0, 1, 2): no_third},
    ),
}


def beside_blanks(rules):
    """(T, T + 1, T + 1); key 0 is the blank, which no rule is asked about."""
    allowed = np.zeros((T, T + 1, T + 1), bool)
    for i, j, k in np.ndindex(allowed.shape):
        token = (i, j - 1, k - 1)
        allowed[i, j, k] = all(
            any(axis and token[axis] < 0 for axis in axes)
            or rule(*(token[axis] for axis in axes))
            for axes, rule in rules.items()
        )
    return allowed


@pytest.mark.parametrize("name", MASKS)
def test_no_mask_hides_a_blank(name):
    mask, rules = MASKS[name]
    layer, x = made(blank_key=True), draw(1, T, D)
    allowed = beside_blanks(rules)
    _, expected = expected_of(layer, x, (x, x), allowed)
    found = weights_of(layer, x, mask=mask)
    assert_close(found, expected, dtype="float32", length=(T + 1) ** 2)
    np.testing.assert_array_equal((np.asarray(found) > 0).any((0, 1)), allowed)


@pytest.mark.parametrize("name", MASKS)
def test_blocks_beside_blanks_are_what_they_are_said_to_be(name):
    mask, rules = MASKS[name]
    if name == "causal":
        mask = masks.PerAxis(mask, mask)
    allowed = beside_blanks(rules)
    lifted = _tensor_attention._beside_blanks(mask)
    proved = set()
    for first in itertools.product(range(T), range(T + 1), range(T + 1)):
        for size in ((1, 1, 1), (3, 3, 3), (2, 1, 4)):
            last = [
                min(a + n, m)
                for a, n, m in zip(first, size, allowed.shape, strict=True)
            ]
            edges = itertools.chain(*zip(first, last, strict=True))
            status = int(lifted.block_status(*edges))
            block = allowed[*(slice(a, b) for a, b in zip(first, last, strict=True))]
            if status != Block.SOME:
                assert block.all() == block.any() == (status == Block.ALL)
                proved.add(status)
    assert proved == {Block.NONE, Block.ALL}


def test_masks_that_hold_arrays_are_of_tokens_too():
    layer, x = made(blank_key=True), draw(2, T, D)
    lengths = jnp.array([3, T])
    ids = jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    mask = masks.PerAxis(
        masks.Padding(key=lengths),
        None,
        joint=masks.Between(1, 2, masks.Segments(ids)),
    )
    found = call(layer, x, mask=mask)
    allowed = np.ones((2, T, T + 1, T + 1), bool)
    same = np.asarray(ids[:, :, None] == ids[:, None, :])
    allowed[:, :, 1:, 1:] = same[:, None]
    allowed[0, :, 4:] = False
    expected, _ = expected_of(layer, x, (x, x), allowed[:, None])
    assert_close(found, expected, dtype="float32", length=(T + 1) ** 2 * D)


def test_query_without_a_tuple_attends_to_nothing_or_to_the_blanks():
    x, nothing = draw(1, T, D), masks.PerAxis(None, ~masks.All())
    bare, blank = made(use_bias=True), made(use_bias=True, blank_key=True)
    expected = jnp.broadcast_to(bare.out.bias[...], x.shape)
    np.testing.assert_array_equal(call(bare, x, mask=nothing), expected)
    weights = np.asarray(weights_of(blank, x, mask=nothing))
    np.testing.assert_allclose(weights[..., 0].sum(-1), 1, rtol=1e-6)


def test_blanks_start_so_that_a_pair_with_one_is_ordinary_attention():
    layer = TensorAttention(D, HEADS, blank_key=True, rngs=nnx.Rngs(0))
    pairwise = TensorAttention(D, HEADS, order=2, blank_key=True, rngs=nnx.Rngs(1))
    pairwise.query, pairwise.out = layer.query, layer.out
    pairwise.keys[0], pairwise.values[0] = layer.keys[1], layer.values[1]
    x = draw(2, T, D)
    only_second = masks.PerAxis(~masks.All(), None)
    found = call(layer, x, mask=only_second)
    assert_close(found, call(pairwise, x), dtype="float32", length=T * D)


# -------------------------------------------------------------------------- polynomial
@pytest.mark.parametrize(
    ("mask", "blank"),
    [(None, False), (masks.Causal(), False), (masks.Causal(), True)],
    ids=["all", "causal", "causal beside a blank"],
)
def test_polynomial_is_near_exact(mask, blank):
    sizes = {"head_features": 2, "blank_key": blank, "scale": 0.02}
    polynomial = made(**sizes, method="polynomial", degree=6)
    x = draw(2, T, D)
    found, expected = call(polynomial, x, mask=mask), call(made(**sizes), x, mask=mask)
    assert_close(found, expected, dtype="float32", length=T * T * D, c=16)


def test_polynomial_has_the_degree_and_takes_the_mask_per_axis():
    layer, x = made(head_features=2, method="polynomial", degree=0), draw(1, T, D)
    causal = masks.PerAxis(masks.Causal(), masks.Causal())
    # A constant gives every pair the same weight.
    count = jnp.arange(1, T + 1).reshape(1, T, 1, 1)
    mean = lambda linear: jnp.cumsum(linear(x), axis=1) / count
    expected = layer.out(mean(layer.values[0]) * mean(layer.values[1]))
    found = call(layer, x, mask=causal)
    assert_close(found, expected, dtype="float32", length=T * T * D)


def test_logits_beyond_the_bound_are_nan():
    layer = made(head_features=2, method="polynomial", logit_bound=1e-3, rtol=0.1)
    assert bool(jnp.isnan(call(layer, draw(1, T, D))).all())


# ----------------------------------------------------------------------- as any module
def test_every_parameter_has_its_name_and_learns():
    layer, x = made(blank_key=True, use_bias=True), draw(2, T, D)
    loss = lambda layer: (layer(x, mask=masks.Causal()) ** 2).sum()
    found = nnx.to_flat_state(nnx.jit(nnx.grad(loss))(layer))
    linears = ["query", "keys.0", "keys.1", "values.0", "values.1", "out"]
    expected = [f"{name}.{part}" for name in linears for part in ("bias", "kernel")]
    paths = [".".join(map(str, path)) for path, _ in found]
    assert sorted(paths) == sorted([*expected, "blank_keys", "blank_values"])
    for path, leaf in found:
        assert float(jnp.abs(leaf[...]).max()) > 0, path


def test_state_comes_back_and_remat_changes_nothing():
    layer, x = made(blank_key=True), draw(2, T, D)
    graph, state = nnx.split(layer)

    def loss(run):
        return jax.jit(jax.value_and_grad(lambda s: (run(s) ** 2).sum()))(state)

    run = lambda state: nnx.merge(graph, state)(x)
    (value, gradient), (again, same) = loss(run), loss(jax.checkpoint(run))
    np.testing.assert_allclose(value, again, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        gradient,
        same,
    )


@pytest.mark.parametrize(
    "options", [{}, {"method": "polynomial", "degree": 2, "head_features": 2}]
)
def test_lower_precision_is_near_float32(options):
    narrow = made(dtype=jnp.bfloat16, blank_key=True, scale=0.1, **options)
    full = made(blank_key=True, scale=0.1, **options)
    x = draw(2, T, D, dtype=jnp.bfloat16)
    found, expected = call(narrow, x), call(full, x.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    assert_close(found, expected, dtype="bfloat16", length=T * T * D)
    loss = lambda layer: layer(x).astype(jnp.float32).sum()
    gradients = jax.tree.leaves(nnx.eval_shape(nnx.grad(loss), narrow))
    assert {leaf.dtype for leaf in gradients} == {jnp.dtype("float32")}


def test_any_leading_axes():
    layer = made(blank_key=True)
    for shape in ((T, D), (2, 3, T, D)):
        found = jax.eval_shape(lambda x: layer(x), draw(*shape))
        assert found.shape == shape


def test_errors_name_what_is_wrong(untyped):
    def error(kind, match, *sizes, **options):
        with pytest.raises(kind, match=f"TensorAttention: {match}"):
            TensorAttention(*(sizes or (D, HEADS)), **options, rngs=nnx.Rngs(0))

    error(ValueError, "`order` must be at least 2, got 1", order=1)
    error(TypeError, "`order` must be a Python int", order=3.0)
    error(ValueError, r"`num_key_heads` must divide .* \(4\), got 3", num_key_heads=3)
    error(ValueError, r"`num_heads` must divide `features` \(8\) unless .* got 3", 8, 3)
    error(ValueError, "`head_features` must be at least 1, got 0", head_features=0)
    error(ValueError, r"`kv_features` .* or 2 .* got 3", kv_features=(8, 8, 8))
    error(ValueError, "`method` must be one of 'exact', 'poly.*'", method="taylor")
    error(ValueError, "`logit_bound` or `degree` must be given", method="polynomial")
    error(ValueError, "`degree` must be None for the method 'exact', got 3", degree=3)
    both: dict[str, Any] = {"method": "polynomial", "degree": 3}
    error(ValueError, "`rtol` must be None if `degree` is given", rtol=0.1, **both)
    error(ValueError, "`implementation` must be None", implementation="xla", **both)
    x = draw(1, T, D)
    with pytest.raises(
        ValueError, match=r"`inputs_kv` must be one sequence, or 2 .* 3"
    ):
        made()(x, (x, x, x))
    with pytest.raises(TypeError, match=r"`mask` must be a mask value, .* got Array"):
        made(blank_key=True)(x, mask=jnp.ones((T, T), bool))
    polynomial = made(**both)
    for mask in (
        masks.Window(1, 0),
        masks.PerAxis(masks.Causal(), None),
        masks.PerAxis(None, None, joint=no_third),
    ):
        with pytest.raises(
            ValueError, match=r"`mask` must be None or masks.Causal\(\)"
        ):
            polynomial(x, mask=mask)
