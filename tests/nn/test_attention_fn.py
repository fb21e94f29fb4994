"""`attention_fn` in the attention layers of Flax: equal to Flax's own, under masks."""

import functools
import inspect
from typing import Any, NamedTuple

import flax.linen.attention
import flax.nnx.nn.attention
import jax
import numpy as np
import pytest
from flax import linen, nnx

from softlib import attention, masks
from softlib.nn import attention_fn
from softlib.testing import assert_close
from tests.host import jnp

B, T, D, N = 2, 7, 12, 4
WINDOW = masks.Window(2, 1)


def inputs(*shape, seed=0):
    found = np.random.default_rng(seed).normal(size=shape or (B, T, D))
    return jnp.asarray(found, jnp.float32)


def array_mask(*shape, seed=3):
    """Random, with at least one key for every query."""
    found = np.random.default_rng(seed).random(shape) < 0.5
    return jnp.asarray(found | np.eye(*shape[-2:], dtype=bool))


def nnx_layer(function=None, **options) -> Any:
    given: dict[str, Any] = {"decode": False, **options}
    if function is not None:
        given["attention_fn"] = function
    make = lambda: nnx.MultiHeadAttention(N, D, rngs=nnx.Rngs(0), **given)
    layer = nnx.eval_shape(make)
    state = nnx.state(layer, nnx.Param)
    nnx.update(layer, drawn(state))
    if given.get("dropout_rate"):  # its keys are no numbers to draw
        layer.rngs = nnx.Rngs(0).dropout
    return layer


def drawn(shapes):
    """Neither a compilation of the initialisers, nor biases of 0."""
    draw = np.random.default_rng(0).normal
    make = lambda leaf: jnp.asarray(draw(scale=0.3, size=leaf.shape), leaf.dtype)
    return jax.tree.map(make, shapes)


def linen_layer(function=None, **options) -> Any:
    if function is not None:
        options["attention_fn"] = function
    return linen.MultiHeadDotProductAttention(num_heads=N, **options)


class Results(NamedTuple):
    out: Any
    gradients: Any


def results(call, gradients, parameters, *arrays) -> Results:
    def loss(*arrays):
        out = call(*arrays)
        weight = jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return (out * weight).sum(), out

    if not gradients:
        return Results(jax.jit(call)(parameters, *arrays), None)
    every = tuple(range(1 + len(arrays)))
    found = jax.jit(jax.value_and_grad(loss, every, has_aux=True))(parameters, *arrays)
    (_, out), gradients = found
    return Results(out, gradients)


def of_nnx(layer, *arrays, gradients=False, **options) -> Results:
    graph, state = nnx.split(layer)
    call = lambda state, *arrays: nnx.merge(graph, state)(*arrays, **options)
    return results(call, gradients, state, *arrays)


def of_linen(layer, *arrays, gradients=False, **options) -> Results:
    variables = drawn(jax.eval_shape(layer.init, jax.random.key(0), *arrays))
    call = lambda variables, *arrays: layer.apply(variables, *arrays, **options)
    return results(call, gradients, variables, *arrays)


def assert_same(found: Results, expected: Results, dtype="float32"):
    leaves, oracles = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(leaves) == len(oracles) > 0
    for one, other in zip(leaves, oracles, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, dtype=dtype, length=T * D, c=8)


LAYERS = {"nnx": (of_nnx, nnx_layer), "linen": (of_linen, linen_layer)}
both_apis = pytest.mark.parametrize(("of", "layer"), LAYERS.values(), ids=LAYERS)

# ------------------------------------------------------------------ equal to Flax's own
# Options of the layer and of its call.
CASES = {
    "no_mask": ("nnx", {}, {}),
    "causal": ("nnx", {}, {"is_causal": True, "mask": array_mask(B, 1, T, T)}),
    "grouped": (
        "nnx",
        {"num_kv_heads": 2, "normalize_qk": True},
        {"mask": array_mask(B, N, T, T)},
    ),
    "linen_mask_in_float32": (
        "linen",
        {},
        {"mask": linen.make_causal_mask(jnp.ones((B, T)))},
    ),
    "linen_mask_per_head": (
        "linen",
        {"normalize_qk": True},
        {"mask": array_mask(B, N, T, T)},
    ),
}
WITH_GRADIENTS = ("no_mask", "causal", "grouped", "linen_mask_in_float32")


@pytest.mark.parametrize("case", CASES)
def test_layer_equals_that_with_flaxs_own_attention(case):
    api, options, call = CASES[case]
    of, layer = LAYERS[api]
    call = {"gradients": case in WITH_GRADIENTS, **call}
    found = of(layer(attention_fn(), **options), inputs(), **call)
    assert_same(found, of(layer(**options), inputs(), **call))


@pytest.mark.parametrize("shape", [(), (1, 1), (B, 1), (1, N), (B, N)])
def test_mask_and_bias_broadcast_to_the_pairs(shape):
    query, key, value = (inputs(B, T, N, 3, seed=i) for i in range(3))
    mask, bias = array_mask(*shape, T, T), inputs(*shape, T, T, seed=4)
    rank = (1,) * (4 - bias.ndim)
    wide_bias, wide_mask = (x.reshape(*rank, *x.shape) for x in (bias, mask))
    found = jax.jit(attention_fn())(query, key, value, bias, mask)
    expected = nnx.dot_product_attention(query, key, value, wide_bias, wide_mask)
    assert_close(found, expected, dtype="float32", length=T)


@both_apis
def test_cross_attention_and_several_batch_axes(of, layer):
    query, source = inputs(B, 3, T, D), inputs(B, 3, 5, D, seed=1)
    mask = array_mask(B, 3, 1, T, 5)
    found = of(layer(attention_fn()), query, source, mask=mask)
    assert_same(found, of(layer(), query, source, mask=mask))


@both_apis
def test_pairs_attend_where_both_masks_allow_it(of, layer):
    own = array_mask(B, 1, T, T)
    both = own & jnp.asarray(WINDOW.materialize(T))[None, None]
    found = of(layer(attention_fn(WINDOW)), inputs(), mask=own)
    assert_same(found, of(layer(), inputs(), mask=both))


@both_apis
def test_mask_of_the_call_may_be_a_mask_value_with_arrays(of, layer):
    x, padding = inputs()[:, :5], masks.Padding(key=jnp.array([3, 7]))
    both = padding.materialize(5) & jnp.asarray(WINDOW.materialize(5))[None]
    found = of(layer(attention_fn(WINDOW)), x, mask=padding)
    assert_same(found, of(layer(), x, mask=both[:, None]))


def test_float64_is_not_lowered():
    with jax.enable_x64():
        x, options = inputs().astype(jnp.float64), {"param_dtype": jnp.float64}
        found = of_linen(linen_layer(attention_fn(WINDOW), **options), x)
        mask = jnp.asarray(WINDOW.materialize(T))[None, None]
        expected = of_linen(linen_layer(**options), x, mask=mask)
        assert_same(found, expected, dtype="float64")


@both_apis
def test_dtype_is_that_of_the_layer_and_parameters_keep_theirs(of, layer):
    options, call = {"dtype": jnp.bfloat16}, {"gradients": of is of_nnx}
    found = of(layer(attention_fn(), **options), inputs(), **call)
    assert found.out.dtype == jnp.bfloat16
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(found.gradients)}
    assert dtypes <= {jnp.dtype("float32")}
    assert_same(found, of(layer(**options), inputs(), **call), dtype="bfloat16")


def test_mixed_dtypes_are_promoted_as_flax_does():
    query, key, value = (inputs(B, T, N, 3, seed=i) for i in range(3))
    query = query.astype(jnp.bfloat16)
    found = attention_fn()(query, key, value)
    assert found.dtype == jnp.float32
    assert attention_fn()(query, key, value, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert_close(
        found,
        nnx.dot_product_attention(query, key, value),
        dtype="float32",
        length=T,
    )


def test_options_reach_the_attention():
    query, key, value = (inputs(B, T, N, 3, seed=i) for i in range(3))
    options: dict[str, Any] = {"scale": 0.3, "softcap": 2.0}
    options["normalizer"] = "softplus"
    blocks = {"block_query": 8, "block_key": 8}
    attend = attention_fn(WINDOW, **options, **blocks, implementation=["reference"])
    found = attend(query, key, value)
    expected = attention.dot_product_attention(
        query, key, value, mask=WINDOW, **options, implementation="reference"
    )
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(NotImplementedError, match="pallas"):
        attention_fn(implementation="pallas_tpu")(query, key, value)


# ------------------------------------------------------- nothing is dropped or ignored
@pytest.mark.parametrize("module", [flax.nnx.nn.attention, flax.linen.attention])
def test_every_argument_that_flax_may_pass_is_named(module):
    theirs = inspect.signature(module.dot_product_attention).parameters
    ours = inspect.signature(attention_fn()).parameters
    # No layer passes a function for the promotion of dtypes.
    assert set(theirs) - {"promote_dtype"} <= set(ours)
    kinds = {parameter.kind for parameter in ours.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    shared = [name for name in theirs if name in ours]
    assert shared[:5] == list(ours)[:5], "they may be passed by position"


def test_the_tests_see_an_adapter_that_drops_the_mask():
    def dropping(query, key, value, **_):
        return attention_fn()(query, key, value)

    call = CASES["linen_mask_per_head"][2]
    found = of_linen(linen_layer(dropping), inputs(), **call)
    with pytest.raises(AssertionError, match="too far off"):
        assert_same(found, of_linen(linen_layer(), inputs(), **call))


@both_apis
def test_query_without_keys_gets_0_where_flax_gives_the_mean(of, layer):
    mask = array_mask(B, 1, T, T).at[:, :, 2].set(False)
    options = {"use_bias": False}
    found = of(layer(attention_fn(), **options), inputs(), mask=mask).out
    assert not found[:, 2].any()
    flax_gives = of(layer(**options), inputs(), mask=mask).out
    assert flax_gives[:, 2].any()
    others = jnp.arange(T) != 2
    expected = flax_gives[:, others]
    assert_close(found[:, others], expected, dtype="float32", length=T * D)


def test_query_without_keys_gives_no_gradient():
    mask = array_mask(B, 1, T, T).at[:, :, 2].set(False)
    weight = jnp.sin(jnp.arange(D * T) + 1.0).reshape(1, T, D)

    def gradient(layer, weight):
        loss = lambda x: (layer(x, mask=mask) * weight).sum()
        return jax.jit(jax.grad(loss))(inputs())

    found = gradient(nnx_layer(attention_fn()), weight)
    # Flax, with the row of the mean taken out of the loss.
    expected = gradient(nnx_layer(), weight.at[:, 2].set(0))
    assert_close(found, expected, dtype="float32", length=T * D)


def test_dropout_raises_unless_it_is_off():
    layer = nnx_layer(attention_fn(), dropout_rate=0.5, deterministic=False)
    with pytest.raises(ValueError, match=r"`dropout_rate` must be 0 .* got 0\.5"):
        layer(inputs())
    assert layer(inputs(), deterministic=True).shape == (B, T, D)
    layer = linen_layer(attention_fn(), dropout_rate=0.5)
    variables = layer.init(jax.random.key(0), inputs(), deterministic=True)
    call = functools.partial(layer.apply, variables, inputs())
    with pytest.raises(ValueError, match=r"`dropout_rate` must be 0 .* got 0\.5"):
        call(deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert call(deterministic=True).shape == (B, T, D)


def test_capture_of_the_weights_raises():
    with pytest.raises(ValueError, match=r"`module` must be None \(no `sow_weights`"):
        nnx_layer(attention_fn())(inputs(), sow_weights=True)
    layer = linen_layer(attention_fn())
    with pytest.raises(ValueError, match=r"`module` must be None \(no `sow_weights`"):
        layer.init(jax.random.key(0), inputs(), sow_weights=True)


@pytest.mark.parametrize(
    "name", ["qk_attn_weights_einsum", "attn_weights_value_einsum"]
)
def test_products_by_other_functions_raise(name):
    layer = linen_layer(attention_fn(), **{f"{name}_cls": lambda: jnp.einsum})
    with pytest.raises(ValueError, match=f"`{name}` must be None"):
        layer.init(jax.random.key(0), inputs())


def test_softmax_is_float32_whether_it_is_forced_or_not():
    layers = [
        linen_layer(attention_fn(), dtype=jnp.bfloat16, force_fp32_for_softmax=forced)
        for forced in (False, True)
    ]
    one, other = (of_linen(layer, inputs())[0] for layer in layers)
    np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------ a cache
def decoded(layer, x, **options_at):
    """One token after the other; `options_at` are functions of the position."""
    layer.init_cache(x.shape)
    step = nnx.jit(lambda layer, x, options: layer(x, decode=True, **options))
    steps = []
    for t in range(x.shape[1]):
        options = {name: value(t) for name, value in options_at.items()}
        steps.append(step(layer, x[:, t : t + 1], options))
    return jnp.concatenate(steps, 1)


def positions_at(t):
    return jnp.full((B, 1), t)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}])
def test_nnx_cache_gives_the_whole_sequence(options):
    whole = nnx_layer(attention_fn(masks.Causal()), **options)(inputs())
    found = decoded(nnx_layer(attention_fn(), **options), inputs())
    assert_close(found, whole, dtype="float32", length=T * D)
    padded = nnx_layer(attention_fn(), **options)
    first_two = jnp.arange(T) < 2
    found = decoded(padded, inputs(), mask=lambda t: first_two[None, None, None])
    assert float(jnp.abs(found - whole)[:, 2:].min()) > 0


def test_nnx_cache_with_a_mask_of_positions():
    mask = masks.Window(2, 0)
    whole = nnx_layer(attention_fn(mask))(inputs())
    layer = nnx_layer(attention_fn(mask))
    found = decoded(layer, inputs(), input_positions=positions_at)
    assert_close(found, whole, dtype="float32", length=T * D)


def test_linen_cache_with_the_row_of_a_mask():
    mask, x = masks.Window(2, 0), inputs()
    layer = linen_layer(attention_fn(mask))
    variables = layer.init(jax.random.key(0), x)
    whole = layer.apply(variables, x)
    step_layer = layer.clone(decode=True, attention_fn=attention_fn())
    cache = step_layer.init(jax.random.key(0), x)["cache"]

    @jax.jit
    def step(cache, x, t):
        row = mask(t[None, None], jnp.arange(T)[None, :])[None, None]
        variables_now = {**variables, "cache": cache}
        out, new = step_layer.apply(variables_now, x, mask=row, mutable=["cache"])
        return out, new["cache"]

    steps = []
    for t in range(T):
        out, cache = step(cache, x[:, t : t + 1], jnp.array(t))
        steps.append(out)
    found = jnp.concatenate(steps, 1)
    assert_close(found, whole, dtype="float32", length=T * D)


def test_a_mask_that_needs_the_position_of_a_cached_query_raises():
    layer = nnx_layer(attention_fn(masks.Causal()))
    layer.init_cache((B, T, D))
    with pytest.raises(
        ValueError, match=r"must not depend on the position.*got 7 keys"
    ):
        layer(inputs(B, 1, D), decode=True)
    layer = linen_layer(attention_fn(masks.Causal()), decode=True)
    variables = layer.init(jax.random.key(0), inputs())
    with pytest.raises(ValueError, match="must not depend on the position"):
        layer.apply(variables, inputs(B, 1, D), mutable=["cache"])
    query, key = inputs(B, 1, N, 3), inputs(B, T, N, 3)
    with pytest.raises(ValueError, match="must not depend on the position"):
        attention_fn()(query, key, key, is_causal=True)


def test_a_mask_of_keys_alone_needs_no_position():
    query, key = inputs(B, 1, N, 3), inputs(B, T, N, 3, seed=1)
    lengths = jnp.array([3, 6])
    found = attention_fn()(query, key, key, mask=masks.Padding(key=lengths))
    rows = (jnp.arange(T)[None, :] < lengths[:, None])[:, None, None]
    expected = nnx.dot_product_attention(query, key, key, mask=rows)
    assert_close(found, expected, dtype="float32", length=T)


def test_positions_of_a_whole_sequence_raise():
    with pytest.raises(ValueError, match=r"`input_positions` must be None .*7 queries"):
        nnx_layer(attention_fn())(inputs(), input_positions=jnp.ones((B, T), int))


# ---------------------------------------------------------------------- as a value
def test_equal_layers_share_a_compilation():
    traces = []

    @nnx.jit
    def call(layer, x):
        traces.append(None)
        return layer(x)

    for _ in range(2):
        call(nnx_layer(attention_fn(masks.Window(2, 1))), inputs())
    assert len(traces) == 1
    call(nnx_layer(attention_fn(masks.Window(2, 2))), inputs())
    assert len(traces) == 2
    assert attention_fn(WINDOW) == attention_fn(masks.Window(2, 1))
    assert hash(attention_fn(WINDOW)) == hash(attention_fn(masks.Window(2, 1)))


def test_errors_name_what_is_wrong(untyped):
    ids = jnp.zeros(T, int)
    with pytest.raises(TypeError, match=r"`mask` must hold no arrays.*got Segments"):
        attention_fn(masks.Segments(ids))
    with pytest.raises(TypeError, match=r"`mask` must be a mask value.*got ArrayImpl"):
        attention_fn(jnp.ones((T, T), bool))  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match=r"`normalizer` must be one of.*got 'exp'"):
        attention_fn(normalizer="exp")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="`softcap` must be positive"):
        attention_fn(softcap=0.0)
    with pytest.raises(TypeError, match="`scale` must be a Python number"):
        attention_fn(scale=jnp.float32(1))  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="`block_key` must be at least 1, got 0"):
        attention_fn(block_key=0)
    x = inputs(B, T, N, 3)
    plan = attention.block_plan(WINDOW, T, T)
    with pytest.raises(TypeError, match=r"`mask` must be an array.*got BlockPlan"):
        attention_fn()(x, x, x, mask=plan)
    with pytest.raises(ValueError, match="`mask` must have 4 axes"):
        attention_fn()(x, x, x, mask=jnp.ones((1, 1, 1, T, T), bool))
