"""Every argument that is called differentiable, against differences in float64.

At a generic point, and at those where a rule could select another branch: weights of
exactly 0, temperatures of 1, distributions that are certain or do not sum to 1.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from tests import docstring_rules, example_calls
from tests.host import jnp

STEP = 1e-5  # of the differences
_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n(?: {5}.*)?)*)", re.MULTILINE)

# No derivative in a number: a flag, and a tuple of arrays.
OTHERS = {
    ("losses.linear_softmax_cross_entropy", "return_lse"),
    ("losses.softmax_cross_entropy", "return_lse"),
}
# Integers alone come out.
COUNTS = {"logits.top1_correct"}

MASK, SCORES = jnp.array([[True, True, False]]), jnp.array([[0.3, -0.4, 0.9]])
OF_MASK = {"logits": SCORES, "positives": MASK}

# What to add to the call in the docstring, so that the argument has something to do.
ADDED: dict[str, dict[str, Any]] = {
    "attention.kronecker_attention_polynomial": {"return_bound": False},
    "losses.decoupled_softmax_loss": OF_MASK,
    "losses.one_versus_all_loss": OF_MASK,
    "logits.row_statistics": {"statistics": ("lse", "sum_logits")},
    "losses.sampled_softmax_loss": {"num_sampled": 3},
    "losses.soft_top_k_loss": OF_MASK | {"alpha": 2.0},
    "softmax.dense_to_sparse_gate": {"temperature": 0.8},
    "softmax.gumbel_softmax": {"hard": False},
}

# Points of scalars, by the name or by the function and the name: a pair is the end of
# the domain and the direction into it.
POINTS: dict[str, tuple[Any, ...]] = {
    "alpha": (0.7, 1.0, (0.0, 1)),
    "beta": (0.5, 1.0),
    "budget": (1.5, 2.0),
    "clip_high": (0.25, 0.3),
    "clip_low": (0.25, 0.3),
    "decay": (0.5, (1.0, -1)),
    "epsilon": (0.0, 0.7),
    "gamma": (0.7, 1.0, 2.0, (0.0, 1)),
    "mixture": (0.3, 0.5),
    "mu": (0.5, (0.0, 1)),
    "q": (0.7, (1.0, -1)),
    "scale": (0.7, 1.0, 0.0),
    "shape": (0.7, 1.5),
    "t": (0.0, 0.7, 1.0, 1.5),
    "t1": (0.5, 1.0),
    "t2": (1.0, 1.5),
    "tau": (0.5, 1.0, 1.5, 2.0, (0.0, 1)),
    "temperature": (0.7, 1.0, 3.0),
    "row_temperature": (0.7, 1.0),
    "weight": (0.2, 0.0),
    "width": (0.4, 1.0),
    "a": (0.7, 1.0),
    "recurrent.quasi_lstm.alpha": (0.7, 1.0),
    "attention.softplus_attention.scale": (0.7, 1.0),
    "estimation.comp_sum_transformation.tau": (0.5, 1.5),  # it has kinks at 1 and 2
    "losses.decoupled_knowledge_distillation_loss.beta": (0.5, (0.0, 1)),
    "losses.entmax_loss.alpha": (0.7, 1.0, 1.5, 2.0),
    "losses.log_spherical_softmax_loss.epsilon": (0.7, 1.0),
    "losses.universal_self_distillation_loss.beta": (0.5, (0.0, 1)),
    "numerics.generalized_gaussian_log_prob.scale": (0.7, 1.0),
    "numerics.generalized_gaussian_quantile.scale": (0.7, 1.0),
    "softmax.entmax.alpha": (0.7, 1.0, 1.5, 2.0),
    "softmax.log_spherical_softmax.epsilon": (0.7, 1.0),
    "softmax.normmax.alpha": (1.5, 2.0),
    "softmax.spherical_softmax.epsilon": (0.7, 1.0),
}

# Whose shape, and how much of it, an array of factors has.
LIKE = {
    "bias": lambda given: given["x"].shape,
    "class_weights": lambda given: (
        given["logits"].shape[-1:] if "logits" in given else given["weight"].shape[:1]
    ),
    "label_weights": lambda given: given["labels"].shape,
    "row_weights": lambda given: given["labels"].shape,
    "weights": lambda given: given["positives"].shape,
}


def differentiable() -> dict[str, list[str]]:
    """The arguments whose description has the word, of each function."""
    found: dict[str, list[str]] = {}
    for address, function in example_calls.functions().items():
        arguments = docstring_rules.sections(function.__doc__).get("Args", "")
        for names, text in _ENTRY.findall(arguments):
            for name in names.split(", ") if "differentiable" in text else ():
                short = address.removeprefix("softlib.")
                if (short, name) not in OTHERS and short not in COUNTS:
                    found.setdefault(short, []).append(name)
    return found


def generic(value: Any, draw: np.random.Generator) -> Any:
    """Floating arrays in float64, without the ties and zeros of an example."""
    if not isinstance(value, jax.Array) or not jnp.issubdtype(
        value.dtype, jnp.floating
    ):
        return value
    # Downwards: it may be a log-probability.
    return jnp.asarray(np.float64(value) - 0.1 * draw.uniform(size=value.shape))


def points(short: str, name: str, given: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where to differentiate, and the direction of each number: 0 for both."""
    known = POINTS.get(f"{short}.{name}", POINTS.get(name))
    if name in LIKE and "edit_invariant" not in short:
        shape = LIKE[name](given)
        some = np.random.default_rng(1).uniform(0.5, 1.5, shape)
        yield some, 0
        yield np.where(np.arange(some.size).reshape(shape) % 2, some, 0.0), 1
        yield np.zeros(shape), 1
    elif known is None:
        number = len(given["ngrams"])
        yield np.linspace(0.5, 1.0, number), 0
        yield np.zeros(number), 0
    else:
        for point in known:
            value, side = point if isinstance(point, tuple) else (point, 0)
            yield np.asarray(value), side


def slopes(function: Any, x: np.ndarray, side: int) -> np.ndarray:
    """Of second order, from both sides or into the domain."""
    found = np.zeros(x.shape)
    for place in itertools.product(*map(range, x.shape)):
        step = np.zeros(x.shape)
        step[place] = STEP * (side or 1)
        of = [function(x + k * step) for k in range(3)]
        if side:
            found[place] = (-1.5 * of[0] + 2 * of[1] - 0.5 * of[2]) / step[place]
        else:
            found[place] = (of[1] - function(x - step)) / (2 * STEP)
    return found


def check(call: example_calls.Call, name: str, x: np.ndarray, side: int) -> None:
    check_all(call, name, [(x, side)])


def check_all(
    call: example_calls.Call, name: str, at: Iterable[tuple[np.ndarray, int]]
) -> None:
    """At several points of one argument; points of one shape share a program."""

    def total(value: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(call(**{name: value}))
        kept = [y for y in leaves if jnp.issubdtype(jnp.asarray(y).dtype, jnp.floating)]
        # Not the plain sum, which is constant for probabilities.
        weigh = lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        terms = [jnp.where(jnp.isfinite(y), y * weigh(y), 0).sum() for y in kept]
        return sum(terms, jnp.zeros(()))

    function = jax.jit(jax.value_and_grad(total))
    for x, side in at:
        found = np.asarray(function(x)[1])
        wanted = slopes(lambda x: function(x)[0], x, side)
        where = f"{call.function.__name__}, `{name}` = {x.tolist()}"
        np.testing.assert_allclose(found, wanted, 1e-5, 1e-6, err_msg=where)


@pytest.mark.parametrize("short", differentiable())
def test_derivatives_are_those_of_differences(short):
    address = f"softlib.{short}"
    call = example_calls.of(address).replaced(**ADDED.get(short, {}))
    with jax.enable_x64():
        draw = np.random.default_rng(0)
        given = jax.tree.map(lambda value: generic(value, draw), call.arguments)
        call = call.replaced(**given)
        for name in differentiable()[short]:
            check_all(call, name, points(short, name, given))


# Of these the second derivative at a mass of 0 is infinite.
STEEP = {"entmax_loss", "bi_tempered_logistic_loss"}
DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "softmax_cross_entropy": {},
    "softmax_cross_entropy, smooth": {"label_smoothing": 0.1},
    "stablemax_cross_entropy": {},
    "sparsemax_loss": {},
    "entmax_loss": {"alpha": 1.5},
    "entmax_loss, whole": {"alpha": 3.0},
    "bi_tempered_logistic_loss": {"t1": 0.5, "t2": 1.5},
}


@pytest.mark.parametrize("case", DISTRIBUTIONS)
def test_derivatives_in_distributions_that_are_labels(case):
    """Also off the simplex: differences change one number at a time."""
    name, options = case.partition(",")[0], DISTRIBUTIONS[case]
    address = f"softlib.losses.{name}"
    with jax.enable_x64():
        logits = jnp.array([[0.4, -0.2, 0.1, 2.5]])
        function = example_calls.functions()[address]
        call = example_calls.Call(function, {"logits": logits} | options)
        q = np.array([[0.3, 0.2, 0.1, 0.4]])
        corner = np.eye(4)[:1]
        at = [(q, 0), (1.3 * q, 0), (corner, 1)]
        check_all(call, "labels", at[:2] if case in STEEP else at)
        labels = jnp.concatenate([q, 0.8 * q, corner])
        known = example_calls.Call(function, options | {"labels": labels})
        check(known, "logits", np.tile(logits, (3, 1)), 0)


def test_derivatives_in_the_weights_of_samples():
    with jax.enable_x64():
        draw = np.random.default_rng(0)
        x, y, z = (jnp.asarray(draw.normal(size=(4, k))) for k in (2, 1, 1))
        widths = {"bandwidth_x": 1.0}
        problems: dict[str, dict[str, Any]] = {
            "cauchy_schwarz_divergence": {
                "samples_p": x,
                "samples_q": x + 1,
                "bandwidth": 1.0,
            },
            "cauchy_schwarz_mutual_information": {"x": x, "t": y, "bandwidth_t": 1.0}
            | widths,
            "conditional_cauchy_schwarz_divergence": {
                "x": x,
                "y": y,
                "y_hat": z,
                "bandwidth_y": 1.0,
            }
            | widths,
        }
        for short, given in problems.items():
            address = f"softlib.information.{short}"
            function = example_calls.functions()[address]
            names = ("weights_p", "weights_q") if "samples_p" in given else ("weights",)
            for name in names:
                call = example_calls.Call(function, given)
                some, zeros = [0.5, 1.0, 2.0, 1.5], [0.0, 1.0, 2.0, 0.0]
                check_all(call, name, [(np.array(some), 0), (np.array(zeros), 1)])
