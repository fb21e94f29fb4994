"""Memory of compiled losses, as the compiler accounts for it; nothing is run."""

import re

import jax
import pytest

from softlib.losses import linear_softmax_cross_entropy, softmax_cross_entropy
from tests.heads import of_head
from tests.host import jnp

struct = jax.ShapeDtypeStruct
MIB = 2**20


def compiled(
    rows, features, vocabulary, dtype, vocab_axis=0, arguments=(0, 1), **options
):
    shape = (vocabulary, features) if vocab_axis == 0 else (features, vocabulary)

    def loss(hidden, weight, labels):
        return linear_softmax_cross_entropy(
            hidden, weight, labels, vocab_axis=vocab_axis, **options
        ).mean()

    function = jax.value_and_grad(loss, argnums=arguments)
    operands = (
        struct((rows, features), dtype),
        struct(shape, dtype),
        struct((rows,), jnp.int32),
    )
    return jax.jit(function).lower(*operands).compile()


def temporary(program) -> int:
    return _memory(program).temp_size_in_bytes


def _memory(program):
    found = program.memory_analysis()
    assert found is not None
    return found


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("vocabulary", [65536, 65539])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scratch_is_a_few_tiles(dtype, vocabulary, vocab_axis):
    rows, features = 4096, 1024
    program = compiled(rows, features, vocabulary, dtype, vocab_axis)
    # Naive: 1 GiB of logits, twice. Here: a few tiles, and for a narrow dtype the
    # float32 gradient of hidden.
    gradient = 0 if dtype == jnp.float32 else 4 * rows * features
    assert temporary(program) < 48 * MIB + gradient


@pytest.mark.parametrize("vocabulary", [32_000, 50_257])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_given_logits_are_not_copied_without_their_labels(dtype, vocabulary):
    rows = 512
    operands = struct((rows, vocabulary), dtype), struct((rows,), jnp.int32)
    program = jax.jit(softmax_cross_entropy).lower(*operands).compile()
    copy = 4 * rows * vocabulary
    wide = 0 if dtype == jnp.float32 else copy  # which optax has as well
    assert temporary(program) < wide + copy / 16


@pytest.mark.parametrize("vocabulary", [32768, 262144])
def test_kept_products_are_bounded(vocabulary):
    """Few rows of many features: the backward pass finds some products stored."""
    program = compiled(1024, 512, vocabulary, jnp.float32, 1)
    assert 96 * MIB < temporary(program) < 112 * MIB


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize(
    ("rows", "features", "vocabulary"), [(256, 128, 1000), (64, 512, 32_768)]
)
def test_logits_as_small_as_the_scratch_of_a_stream_are_computed_once(
    rows, features, vocabulary, vocab_axis
):
    program = compiled(rows, features, vocabulary, jnp.float32, vocab_axis)
    # Those of the forward pass and the two gradients, not a fourth, and no loop, whose
    # body would be counted once.
    product = 2 * rows * features * vocabulary
    assert "while" not in (program.as_text() or "")
    cost = program.cost_analysis()
    assert cost is not None
    assert 3 * product < cost["flops"] < 3.5 * product
    assert temporary(program) < 4 * rows * vocabulary + MIB / 4


@pytest.mark.parametrize("features", [256, 512])
def test_a_few_features_are_enough_to_keep_products(features):
    program = compiled(256, features, 32_768, jnp.float32)
    logits = 4 * 256 * 32_768
    assert 3 / 4 * logits < temporary(program) < logits


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("vocabulary", [4096, 4099])
def test_no_buffer_of_logits_and_no_second_weight(vocabulary, vocab_axis):
    rows, features = 384, 512
    program = compiled(
        rows, features, vocabulary, jnp.float32, vocab_axis, vocab_chunk=512
    )
    # Neither fits into the scratch.
    assert temporary(program) < 4 * min(rows * vocabulary, vocabulary * features)
    sizes = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]", program.as_text() or "")
    }
    assert not {(rows, vocabulary), (vocabulary, rows)} & sizes
    # The only arrays of the weight's size have the weight's shape: no padded, no
    # transposed copy.
    own = (vocabulary, features) if vocab_axis == 0 else (features, vocabulary)
    large = {s for s in sizes if len(s) == 2 and s[0] * s[1] >= vocabulary * features}
    assert large == {own}


def test_a_frozen_weight_costs_no_gradient_buffer():
    rows, features, vocabulary = 512, 256, 65536
    both = compiled(rows, features, vocabulary, jnp.float32)
    frozen = compiled(rows, features, vocabulary, jnp.float32, arguments=(0,))
    weight = 4 * vocabulary * features
    assert temporary(frozen) < temporary(both) + MIB
    assert _memory(frozen).output_size_in_bytes < weight // 8


def test_residuals_are_numbers_per_row():
    rows, features, vocabulary = 256, 64, 32768

    def metrics(hidden, weight, labels):
        found = of_head.token_metrics(
            hidden, weight, labels, metrics=("loss", "entropy"), label_smoothing=0.1
        )
        assert found.loss is not None
        assert found.entropy is not None
        return found.loss + found.entropy

    operands = (
        struct((rows, features), jnp.float32),
        struct((vocabulary, features), jnp.float32),
    )
    labels = struct((rows,), jnp.int32)

    def residuals(hidden, weight, labels):
        return jax.vjp(lambda h, w: metrics(h, w, labels), hidden, weight)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, *operands, labels))
    sizes = sorted(leaf.size for leaf in kept)
    arguments = {rows * features, vocabulary * features}
    assert {size for size in sizes if size > 8 * rows} <= arguments


def test_long_inputs_are_taken_in_row_groups():
    features = 256
    few = temporary(compiled(8192, features, 8192, jnp.float32))
    many = temporary(compiled(65536, features, 8192, jnp.float32))
    # Numbers per row grow, tiles do not.
    assert many < few + 65536 * 64


@pytest.mark.slow
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("vocabulary", [256000, 256003])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(jnp.float32, 0.06e9), (jnp.bfloat16, 0.14e9)]
)
def test_the_head_of_a_large_model(dtype, bound, vocabulary, vocab_axis):
    assert temporary(compiled(8192, 2304, vocabulary, dtype, vocab_axis)) < bound
