"""Every bad argument of every public function: one clear message, of the right type."""

import re

import jax
import numpy as np
import pytest

from softlib import losses
from tests.heads import OF_HEAD, OF_STORED, of, of_head, of_stored
from tests.host import jnp

ROWS, FEATURES, CLASSES = 4, 3, 7
HIDDEN = jnp.zeros((ROWS, FEATURES))
WEIGHT = jnp.zeros((CLASSES, FEATURES))
LOGITS = jnp.zeros((ROWS, CLASSES))
LABELS = jnp.zeros(ROWS, int)

pytestmark = pytest.mark.usefixtures("untyped")

TAKES = {
    "row_statistics": {"statistics", "labels"},
    "softmax_cross_entropy": {"labels", "where", "smoothing"},
    "token_log_probs": {"labels", "where"},
    "entropy": {"where"},
    "top1_correct": {"labels", "where"},
    "token_metrics": {"labels", "where", "smoothing", "metrics"},
}

# What the option needs, the option, its bad value, the error, a part of what was got.
COMMON = [
    ("", "bias", jnp.zeros(CLASSES, int), TypeError, "int32"),
    ("", "bias", jnp.zeros(FEATURES), ValueError, "(3,)"),
    ("", "bias", jnp.zeros(()), ValueError, "()"),
    ("", "scale", jnp.zeros(FEATURES), ValueError, "(3,)"),
    ("", "scale", jnp.zeros((ROWS, 1)), ValueError, "(4, 1)"),
    ("", "scale", jnp.zeros(ROWS, bool), TypeError, "bool"),
    ("", "softcap", 0.0, ValueError, "0.0"),
    ("", "softcap", -2.5, ValueError, "-2.5"),
    ("", "softcap", float("nan"), ValueError, "nan"),
    ("", "softcap", jnp.ones(()), TypeError, ""),
    ("", "temperature", jnp.zeros(FEATURES), ValueError, "(3,)"),
    ("", "temperature", jnp.zeros((ROWS, 1)), ValueError, "(4, 1)"),
    ("", "class_where", jnp.ones(CLASSES), TypeError, "float32"),
    ("", "class_where", jnp.ones(FEATURES, bool), ValueError, "(3,)"),
    ("labels", "labels", jnp.zeros(ROWS, bool), TypeError, "bool"),
    ("labels", "labels", jnp.zeros(ROWS - 1, int), ValueError, "(3,)"),
    ("labels", "labels", jnp.zeros((), int), ValueError, "()"),
    ("where", "where", jnp.ones(ROWS), TypeError, "float32"),
    ("where", "where", jnp.ones(ROWS, int), TypeError, "int32"),
    ("where", "where", jnp.ones(ROWS - 1, bool), ValueError, "(3,)"),
    ("where", "where", jnp.ones((2, ROWS), bool), ValueError, "(2, 4)"),
    ("smoothing", "label_smoothing", -0.1, ValueError, "-0.1"),
    ("smoothing", "label_smoothing", 1.5, ValueError, "1.5"),
    ("smoothing", "label_smoothing", float("nan"), ValueError, "nan"),
    ("statistics", "statistics", ("lse", "variance"), ValueError, "'variance'"),
    ("metrics", "metrics", ("loss", "perplexity"), ValueError, "'perplexity'"),
]
LINEAR = [
    ("", "hidden", jnp.zeros((ROWS, FEATURES), int), TypeError, "int32"),
    ("", "hidden", jnp.zeros(()), ValueError, "()"),
    ("", "weight", jnp.zeros((CLASSES, FEATURES), int), TypeError, "int32"),
    ("", "weight", jnp.zeros(CLASSES), ValueError, "(7,)"),
    ("", "weight", jnp.zeros((1, CLASSES, FEATURES)), ValueError, "(1, 7, 3)"),
    ("", "weight", jnp.zeros((CLASSES, FEATURES + 1)), ValueError, "(7, 4)"),
    ("", "weight", jnp.zeros((FEATURES, CLASSES)), ValueError, "(3, 7)"),
    ("", "vocab_axis", 2, ValueError, "2"),
    ("", "vocab_axis", None, ValueError, "None"),
    ("", "class_where", jnp.ones((ROWS, CLASSES), bool), ValueError, "(4, 7)"),
    ("labels", "labels", jnp.zeros(ROWS), TypeError, "float32"),
    ("", "vocab_chunk", 0, ValueError, "0"),
    ("", "vocab_chunk", -3, ValueError, "-3"),
    ("", "vocab_chunk", 2.5, TypeError, "float"),
]
SOFTMAX = [
    ("", "logits", jnp.zeros((ROWS, CLASSES), int), TypeError, "int32"),
    ("", "logits", jnp.zeros(()), ValueError, "()"),
    ("", "class_where", jnp.ones((3, CLASSES), bool), ValueError, "(3, 7)"),
]


def call(function, needs, **changes):
    arrays = {"labels": LABELS} if "labels" in needs else {}
    kind, _, name = function.partition(" ")
    if kind == "linear":
        arrays |= {"hidden": HIDDEN, "weight": WEIGHT}
    else:
        arrays |= {"logits": LOGITS}
    return getattr(of(kind), name)(**(arrays | changes))


def blamed(function, argument):
    """Who complains of a bad argument: the value, or the function."""
    kind, _, name = function.partition(" ")
    if kind == "linear" and argument in ("hidden", "weight", *OF_HEAD):
        return "LinearLogits"
    if kind == "logits" and argument in OF_STORED:
        return "StoredLogits"
    return name


def functions():
    for name, needs in TAKES.items():
        yield f"linear {name}", needs, COMMON + LINEAR
        yield f"logits {name}", needs, COMMON + SOFTMAX


CASES = [
    pytest.param(
        function,
        needs,
        *bad[1:],
        id=f"{function}-{bad[1]}-{re.sub('[^-A-Za-z0-9.,()]+', '', bad[4]) or i}",
    )
    for function, needs, several in functions()
    for i, bad in enumerate(several)
    if not bad[0] or bad[0] in needs
]


@pytest.mark.parametrize(
    ("function", "needs", "argument", "value", "error", "got"), CASES
)
def test_error_names_function_argument_condition_and_value(
    function, needs, argument, value, error, got
):
    with pytest.raises(error) as raised:
        call(function, needs, **{argument: value})
    message = str(raised.value)
    who = blamed(function, argument)
    pattern = rf"{who}: `{argument}` must .*, got .*{re.escape(got)}.*[.?]"
    assert re.fullmatch(pattern, message), message


@pytest.mark.parametrize(("function", "needs"), [f[:2] for f in functions()])
def test_errors_are_the_same_under_jit(function, needs):
    """Shapes and dtypes are known while tracing."""
    bad = jax.jit(lambda bias: call(function, needs, bias=bias))
    who = blamed(function, "bias")
    with pytest.raises(ValueError, match=rf"^{who}: `bias` must .* got \(3,\)"):
        bad(jnp.zeros(FEATURES))


@pytest.mark.parametrize(("function", "needs"), [f[:2] for f in functions()])
def test_a_kernel_that_cannot_run_is_an_error_with_the_reason(function, needs):
    for name in ("pallas", "pallas_tpu", "pallas_gpu", ("pallas",)):
        with pytest.raises(NotImplementedError, match="pallas"):
            call(function, needs, implementation=name)


@pytest.mark.parametrize(("function", "needs"), [f[:2] for f in functions()])
def test_an_unknown_implementation_is_named(function, needs):
    with pytest.raises(ValueError, match=r"`implementation` must .*, got 'cuda'"):
        call(function, needs, implementation="cuda")


@pytest.mark.parametrize(("function", "needs"), [f[:2] for f in functions()])
@pytest.mark.parametrize("implementation", ["reference", "xla", ("pallas", "xla")])
def test_an_implementation_that_can_run_is_taken(function, needs, implementation):
    call(function, needs, implementation=implementation)


@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_label_logits_without_labels(kind):
    with pytest.raises(ValueError, match=r"^row_statistics: `labels` must .*None"):
        call(f"{kind} row_statistics", (), statistics=("lse", "label_logits"))


def test_the_other_layout_names_the_axis():
    with pytest.raises(ValueError, match=r"`weight` must .*got .*\(7, 3\)"):
        call("linear softmax_cross_entropy", {"labels"}, vocab_axis=1)


@pytest.mark.parametrize(
    "labels", [jnp.zeros((ROWS, CLASSES - 1)), jnp.zeros(ROWS), jnp.zeros(CLASSES)]
)
def test_distributions_have_the_shape_of_the_logits(labels):
    with pytest.raises(
        ValueError, match=r"^softmax_cross_entropy: `labels` must .*got"
    ):
        of_stored.softmax_cross_entropy(LOGITS, labels)


def test_several_labels_per_row_have_one_axis_more():
    for labels in (jnp.zeros((ROWS, 2, 2), int), jnp.zeros((2, ROWS), int)):
        with pytest.raises(ValueError, match=r"`labels` must .*got"):
            of_head.row_statistics(HIDDEN, WEIGHT, labels)
        with pytest.raises(ValueError, match=r"`labels` must .*got"):
            of_stored.row_statistics(LOGITS, labels)


def test_bad_values_in_arrays_are_no_error():
    """Only static facts raise: values give NaN in the rows that they touch."""
    loss = losses.linear_softmax_cross_entropy(HIDDEN, WEIGHT, LABELS.at[0].set(-5))
    np.testing.assert_array_equal(np.isnan(loss), [True, False, False, False])
