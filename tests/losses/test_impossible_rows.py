"""Rows whose logits are all -inf, and rows without classes, in every loss with labels.

A mask that is too eager leaves a row in which nothing is possible. Its label costs
+inf, so that it does not look like a perfect loss; a row in which no class exists
costs 0. Neither moves anything.
"""

import functools
import inspect
from typing import Any

import jax
import numpy as np
import pytest

from softlib import LinearLogits, losses
from tests import heads, public_names
from tests.host import jnp

CLASSES, FEATURES = 4, 3
LABELS = jnp.array([1, 2])
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


HIDDEN, WEIGHT = normal(2, FEATURES), normal(CLASSES, FEATURES)
LOGITS, OTHERS = np.asarray(normal(2, CLASSES)), normal(2, CLASSES)
OTHER_HEAD = LinearLogits(HIDDEN, normal(CLASSES, FEATURES))
TARGET, TEACHER = {"teacher_logits": OTHERS}, {"teacher_logits": OTHERS}

# Not of one distribution over classes with a label in each row.
NO_LOSSES = {
    "crf_loss",  # of sequences; see test_crf.py
    "ctc_loss",  # of sequences; see test_ctc.py
    "edge_reconstruction_loss",  # of single scores
    "in_batch_triplet_loss",  # of differences of similarities
    "label_rank",
    "labelled_rows",  # of which a loss is made; see tests/logits
    "row_statistics",
    "sampled_softmax_loss",  # of drawn classes, whose bias it may be told
    "squared_hinge_loss",  # of margins
    "zipf_soft_labels",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bi_tempered_logistic_loss": {"t1": 0.5, "t2": 1.5},
    "decoupled_knowledge_distillation_loss": TEACHER,
    "mcmi_loss": {"centroids": jnp.full((4, 4), 0.25), "weight": 0.1},
    "normalized_distillation_loss": TEACHER,
    "robust_softmax_cross_entropy": {"rho": 0.1, "temperature": 0.5},
    "sdm_loss": {"similarity": 2.0, "distance": jnp.array([0.5, 0.8])},
    "smooth_adversarial_comp_sum_loss": {"adversarial_logits": OTHERS},
    "soft_top_k_loss": {"k": 2},
    "softmax_jensen_shannon_divergence": {"teacher_logits": OTHERS},
    "softmax_kl_divergence": {"teacher_logits": OTHERS},
    "softmax_soft_target_cross_entropy": {"teacher_logits": OTHERS},
    "universal_self_distillation_loss": {"weak_logits": OTHERS},
    "z_loss": {"a": 0.1, "b": 1.0},
}
# What is bounded has its limit.
LIMITS: dict[str, float] = {
    "edit_invariant_sequence_loss": 5.0,  # its floor
    "generalized_cross_entropy_loss": 1 / 0.7,
    "mean_absolute_error_loss": 1.0,
    "sequence_log_probs": -np.inf,
    "token_log_probs": -np.inf,
    "top1_correct": False,
}


# They need the whole of a row.
OF_ARRAYS = {
    "bi_tempered_logistic_loss",
    "entmax_loss",
    "smooth_adversarial_comp_sum_loss",
    "soft_top_k_loss",
    "sparsemax_loss",
    "stablemax_cross_entropy",
}
OF_A_HEAD = " of a head"


def names() -> list[str]:
    """Public functions whose signature asks for labels or positives.

    Those of logits twice: of an array, and of a head.
    """
    asked = {"labels", "positives"}
    found = []
    for each in public_names.public_names():
        if (
            each.package in ("softlib.losses", "softlib.logits")
            and inspect.isfunction(each.value)
            and asked & inspect.signature(each.value).parameters.keys()
            and each.name not in NO_LOSSES
        ):
            found.append(each.name)
            if heads.logits_of(each.value) and each.name not in OF_ARRAYS:
                found.append(each.name + OF_A_HEAD)
    return found


def parts(name: str) -> tuple[str, bool]:
    """The name of the function, and whether it is given a head."""
    return name.removesuffix(OF_A_HEAD), name.endswith(OF_A_HEAD)


# They have none.
WITHOUT_CLASS_WHERE = {
    "mcmi_loss",
    "universal_self_distillation_loss",
}


def problem(name: str, bias: float) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Arrays to differentiate by, and the rest; `bias` is added to the first row.

    Of a linear head to all rows, whose logits have no other way to be infinite.
    """
    name, is_head = parts(name)
    parameters = inspect.signature(heads.function_of(name)).parameters
    sequences = "sequence" in name
    options = dict(OPTIONS.get(name, {}))
    several = sequences or "multi_label" in name or "positives" in parameters
    kind = "positives" if "positives" in parameters else "labels"
    options[kind] = LABELS[:, None] if several else LABELS
    if not is_head and "hidden" not in parameters:
        logits = jnp.asarray(LOGITS + np.array([[bias], [0.0]], np.float32))
        return {"logits": logits[:, None] if sequences else logits}, options
    for other in options.keys() & {"teacher_logits"}:
        prefix = other.removesuffix("logits")
        del options[other]
        options[f"{prefix}hidden"] = OTHER_HEAD.hidden
        options[f"{prefix}weight"] = OTHER_HEAD.weight
    hidden = HIDDEN[:, None] if sequences else HIDDEN
    of_classes = "bias"
    inputs = {"hidden": hidden}
    if "codebook" in parameters:
        of_classes = "token_bias"
    else:
        inputs["weight"] = WEIGHT
    return inputs | {of_classes: jnp.full(CLASSES, bias)}, options


def call(name: str) -> Any:
    name, is_head = parts(name)
    if heads.logits_of(heads.function_of(name)):
        return getattr(heads.of_head if is_head else heads.of_stored, name)
    return heads.function_of(name)


def found(name: str, bias: float, **more: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """All results, and the gradients of the sum of the floating ones."""
    run = program(name, **more) if more else program_without_options(name)
    gradients, results = jax.device_get(run(problem(name, bias)[0]))
    return results, gradients


def program(name: str, **more: Any) -> Any:
    """Compiled once for whatever is added to the first row."""
    _, options = problem(name, 0.0)

    def total(inputs: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        results = call(name)(**inputs, **options, **more)
        leaves = [leaf for leaf in jax.tree.leaves(results) if leaf.dtype != bool]
        return sum((leaf.sum() for leaf in leaves), jnp.zeros(())), results

    return jax.jit(jax.grad(total, has_aux=True))


program_without_options = functools.cache(program)


def expected(name: str, results: Any) -> tuple[Any, Any]:
    """The numbers of the first row, and what they should be."""
    name, _ = parts(name)
    if name == "token_metrics":
        wanted = results._replace(loss=np.inf, correct=False)
    elif name == "universal_self_distillation_loss":
        wanted = results._replace(target=np.inf, non_target=np.inf)
        return results[:2], wanted[:2]  # the third term is of the weak classifier
    else:
        wanted = LIMITS.get(name, np.inf)
    return results, wanted


@pytest.mark.parametrize("name", names())
def test_an_impossible_row_costs_infinity_and_has_no_gradient(name):
    results, gradients = found(name, -jnp.inf)
    results, wanted = expected(name, results)
    for one, limit in zip(*map(jax.tree.leaves, (results, wanted)), strict=True):
        np.testing.assert_allclose(one[0] if one.ndim else one, limit, rtol=1e-6)
    usual, usual_gradients = found(name, 0.0)
    if len(gradients) > 1:  # of a head, all of whose rows are impossible
        for gradient in gradients.values():
            np.testing.assert_array_equal(gradient, 0)
        return
    (gradient,), (usual_gradient,) = gradients.values(), usual_gradients.values()
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.any(gradient[1]) or name.endswith("correct")
    if name != "universal_self_distillation_loss":  # whose mean couples rows
        np.testing.assert_allclose(gradient[1], usual_gradient[1], rtol=1e-6)
        one, other = (jax.tree.leaves(each)[0] for each in (results, usual))
        if one.ndim:  # not of a sum
            np.testing.assert_allclose(one[1], other[1], rtol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n in names() if parts(n)[0] not in WITHOUT_CLASS_WHERE]
)
def test_a_row_without_classes_costs_nothing(name):
    nothing = jnp.zeros(CLASSES, bool)
    results, gradients = found(name, -jnp.inf, class_where=nothing)
    for leaf in jax.tree.leaves((results, gradients)):
        np.testing.assert_array_equal(leaf, 0)


# ------------------------------------------------------------------------------ options
@pytest.mark.parametrize("head", ["", OF_A_HEAD])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_options_of_cross_entropy(head, implementation):
    name = "softmax_cross_entropy" + head
    own = {"implementation": implementation}
    smooth = {"label_smoothing": 0.1, "logsumexp_penalty": 0.1}
    for options in (smooth, {"class_weights": jnp.arange(4.0)}):
        results, gradients = found(name, -jnp.inf, **own, **options)
        assert results[0] == np.inf
        for gradient in gradients.values():
            np.testing.assert_array_equal(gradient[0], 0)
    free = {"class_weights": jnp.zeros(4)}
    np.testing.assert_array_equal(found(name, -jnp.inf, **own, **free)[0], 0)
    # The slope in a traced option is that of the rows that have one.
    inputs, known = problem(name, -jnp.inf)
    loss = functools.partial(call(name), **inputs, **known, **own)
    of_smoothing = jax.jit(jax.grad(lambda x: loss(label_smoothing=x).sum()))
    assert np.isfinite(of_smoothing(0.1))


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "stablemax_cross_entropy"])
def test_distributions_as_labels(name):
    logits = jnp.full((2, CLASSES), -jnp.inf)
    labels = jnp.array([[0.5, 0.5, 0, 0], [0, 0, 0, 0.0]])
    loss = lambda logits: getattr(losses, name)(logits, labels)
    found, pull = jax.vjp(jax.jit(loss), logits)
    np.testing.assert_array_equal(found, [np.inf, 0])
    np.testing.assert_array_equal(pull(jnp.ones(2))[0], 0)


def test_the_sum_over_rows():
    options = {"row_weights": jnp.array([1.0, 0.0])}
    results, gradients = found(
        "softmax_cross_entropy_sum" + OF_A_HEAD, -jnp.inf, **options
    )
    assert results == np.inf
    assert not any(gradient.any() for gradient in gradients.values())
    nothing = {"row_weights": jnp.zeros(2)}
    assert found("softmax_cross_entropy_sum" + OF_A_HEAD, -jnp.inf, **nothing)[0] == 0


def test_an_excluded_label_among_impossible_classes():
    exists = jnp.array([True, False, True, True])
    results, gradients = found("softmax_cross_entropy", -jnp.inf, class_where=exists)
    assert results[0] == np.inf
    np.testing.assert_array_equal(gradients["logits"][0], 0)


# -------------------------------------------------------------------------- divergences
HALF = np.log(2) / 2
# (of the logits, of the target, of both)
DIVERGENCES: dict[str, tuple[dict[str, Any], tuple[float, float, float]]] = {
    "kl": ({}, (np.inf, 0, 0)),
    "reverse kl": ({"reverse": True}, (0, np.inf, 0)),
    "soft target": ({}, (np.inf, 0, 0)),
    "jensen-shannon": ({}, (HALF, HALF, 0)),
}
PAIRS = {
    "kl": "kl_divergence",
    "reverse kl": "kl_divergence",
    "soft target": "soft_target_cross_entropy",
    "jensen-shannon": "jensen_shannon_divergence",
}


@pytest.mark.parametrize("case", DIVERGENCES)
@pytest.mark.parametrize("form", ["softmax", "linear", "linear reference"])
def test_divergences_where_one_has_no_probability(case, form):
    """Mass where there is none costs +inf; what has no mass asks for nothing."""
    options, wanted = DIVERGENCES[case]
    linear, _, implementation = form.partition(" ")
    functions = heads.of_head if linear == "linear" else heads.of_stored
    function = getattr(functions, f"softmax_{PAIRS[case]}")
    if implementation:
        options = options | {"implementation": implementation}

    @jax.jit
    def run(inputs):
        values, pull = jax.vjp(lambda x: function(**x, **options), inputs)
        return values, pull(jnp.ones(2))[0]

    for place, limit in enumerate(wanted):
        biases = [-jnp.inf if place in (own, 2) else 0.0 for own in range(2)]
        if linear == "linear":
            both = {"hidden": HIDDEN, "weight": WEIGHT}
            both |= {"teacher_hidden": OTHER_HEAD.hidden}
            both |= {"teacher_weight": OTHER_HEAD.weight}
            inputs = both | {"bias": jnp.full(CLASSES, biases[0])}
            inputs |= {"teacher_bias": jnp.full(CLASSES, biases[1])}
        else:
            both = {"logits": LOGITS, "teacher_logits": np.asarray(OTHERS)}
            inputs = {
                name: np.float32(logits + bias)
                for (name, logits), bias in zip(both.items(), biases, strict=True)
            }
        values, gradients = jax.device_get(run(inputs))
        np.testing.assert_allclose(values, limit, rtol=1e-6)
        for gradient in gradients.values():
            np.testing.assert_allclose(gradient, 0, atol=1e-7)
