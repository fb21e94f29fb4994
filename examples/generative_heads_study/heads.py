"""The heads that are compared: of many drawn sets at once, and of digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from softlib import LinearLogits, estimation
from softlib.logits import top1_correct

# Enough for an error on digits that does not change; the default is far stricter.
TOLERANCE = 1e-3


@jax.jit
@jax.vmap
def naive_bayes(
    x: jax.Array, labels: jax.Array, where: jax.Array
) -> estimation.LinearHead:
    empty = estimation.NaiveBayesState.zeros(2, x.shape[1])
    return estimation.naive_bayes_head(
        estimation.naive_bayes_update(empty, x, labels, where=where)
    )


def logistic(
    x: jax.Array, labels: jax.Array, where: jax.Array, l2: float
) -> estimation.LinearHead:
    return _logistic(x, labels, where, jnp.float32(l2))


@jax.jit
def _logistic(
    x: jax.Array, labels: jax.Array, where: jax.Array, l2: jax.Array
) -> estimation.LinearHead:
    def fit(x: jax.Array, labels: jax.Array, where: jax.Array) -> estimation.LinearHead:
        found = estimation.fit_logistic_regression(
            x,
            labels,
            num_classes=2,
            l2=l2,
            max_steps=40,
            where=where,
        )
        return estimation.LinearHead(found.weight, found.bias)

    return jax.vmap(fit)(x, labels, where)


# --------------------------------------------------------------------------- digits
SMOOTHINGS = (0.1, 1.0, 10.0)  # of variances of pixels, 0 to 16
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
GENERATIVE = ("naive Bayes", "naive Bayes, own variances")
DISCRIMINATIVE = "logistic regression"


@functools.partial(jax.jit, static_argnames="shared")
def _naive_bayes(
    x: jax.Array,
    labels: jax.Array,
    fitted: jax.Array,
    smoothing: jax.Array,
    shared: bool,
) -> jax.Array:
    """Whether each digit is told right by the head of those that are `fitted`."""
    empty = estimation.NaiveBayesState.zeros(10, x.shape[1])
    state = estimation.naive_bayes_update(empty, x, labels, where=fitted)
    logits = estimation.naive_bayes_logits(
        state, x, var_smoothing=smoothing, shared_variance=shared
    )
    return top1_correct(logits, labels)


@jax.jit
def _logistic_digits(
    x: jax.Array, labels: jax.Array, fitted: jax.Array, l2: jax.Array
) -> estimation.LinearHead:
    fit = estimation.fit_logistic_regression(
        x,
        labels,
        num_classes=10,
        l2=l2,
        max_steps=30,
        tolerance=TOLERANCE,
        where=fitted,
    )
    return estimation.LinearHead(fit.weight, fit.bias)


def _logistic_right(
    x: jax.Array, labels: jax.Array, fitted: jax.Array, l2: jax.Array
) -> jax.Array:
    most = -(-int(fitted.sum()) // 200) * 200  # those to fit are the first
    head = _logistic_digits(x[:most], labels[:most], fitted[:most], l2)
    return top1_correct(LinearLogits(x, head.weight, bias=head.bias), labels)


METHODS = {
    GENERATIVE[0]: (functools.partial(_naive_bayes, shared=True), SMOOTHINGS),
    GENERATIVE[1]: (functools.partial(_naive_bayes, shared=False), SMOOTHINGS),
    DISCRIMINATIVE: (_logistic_right, PENALTIES),
}


def digit_errors(
    x: np.ndarray, labels: np.ndarray, size: int, tested: int
) -> dict[str, float]:
    """Error on the last `tested` digits of each head fitted to the first `size`.

    Its one option is the best for the last fifth of these, fitted to the others.
    """
    kept = size - size // 5
    first = lambda count: jnp.arange(len(labels)) < count
    found = {}
    for name, (right, values) in METHODS.items():
        options = [jnp.float32(value) for value in values]
        of = lambda count, option, right=right: np.asarray(
            right(jnp.asarray(x), jnp.asarray(labels), first(count), option)
        )
        scores = [of(kept, option)[kept:size].mean() for option in options]
        # Of equal ones the largest: the smoothest.
        best = len(scores) - 1 - int(np.argmax(scores[::-1]))
        found[name] = 1 - float(of(size, options[best])[-tested:].mean())
    return found
