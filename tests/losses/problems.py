"""Arguments for one case of the options, the function's results, and how to compare."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softlib.testing import assert_close

SHAPES = {
    "V": (1, 2, 127, 1000, 50257, 151936),
    "N": (7, 1, 1000),
}
SMALL = 10**6  # logits of the largest case of the default suite
OPTIONS = {
    "dtype": ("float64", "float32", "bfloat16", "float16"),
    "source": ("rows", "columns", "logits"),  # weight (V, D), weight (D, V), none
    "bias": (False, True),
    "scale": (None, "scalar", "row"),
    "softcap": (None, 5.0),
    "temperature": (None, "scalar", "row"),
    "class_where": (False, True),
    "chunks": ("several", "many", "chosen"),
}
BATCH = {1: (1, 1), 7: (7,), 1000: (10, 100)}


def is_small(case: Mapping[str, Any]) -> bool:
    return case.get("N", 1) * case.get("V", 1) <= SMALL


def precision(dtype: str):
    """The context in which float64 arrays exist."""
    return jax.enable_x64() if dtype == "float64" else contextlib.nullcontext()


class Problem:
    """Differentiable arrays by argument name, and the other options by name."""

    def __init__(self, case: Mapping[str, Any], seed: int = 0):
        v, n, dtype = case["V"], case["N"], case["dtype"]
        random = np.random.default_rng([seed, v, n])
        d = 5 if v <= 1000 else 8
        self.classes, self.rows, self.features = v, n, d
        self.batch = BATCH.get(n, (n,))
        self.random, self.dtype = random, jnp.dtype(dtype)
        self.linear = case["source"] != "logits"
        self.options: dict[str, Any] = {}
        arrays: dict[str, np.ndarray] = {}
        if self.linear:
            arrays["hidden"] = random.normal(size=(*self.batch, d))
            # Logits of standard deviation 2: a few classes carry most of the mass.
            weight = random.normal(size=(v, d)) * 2 / np.sqrt(d)
            if case["source"] == "columns":
                weight = weight.T
                self.options["vocab_axis"] = 1
            arrays["weight"] = weight
            if case["chunks"] != "chosen" and v > 1:
                parts = 3 if case["chunks"] == "several" else 12
                self.options["vocab_chunk"] = ragged_chunk(v, parts)
        else:
            arrays["logits"] = 2 * random.normal(size=(*self.batch, v))
        if case["bias"]:
            arrays["bias"] = random.normal(size=v)
        for name in ("scale", "temperature"):
            if case[name]:
                shape = self.batch if case[name] == "row" else ()
                arrays[name] = random.uniform(0.5, 1.5, shape)
        self.arrays = {name: jnp.asarray(a, dtype) for name, a in arrays.items()}
        if case["softcap"] is not None:
            self.options["softcap"] = case["softcap"]
        self.class_where = None
        if case["class_where"]:
            chosen = random.uniform(size=v) < 0.7
            chosen[0] = True
            self.class_where = jnp.asarray(chosen)

    def labels(self, *more: int) -> np.ndarray:
        return self.random.integers(0, self.classes, (*self.batch, *more))

    def cotangent(self, *more: int) -> np.ndarray:
        return self.random.normal(size=(*self.batch, *more)).astype(np.float32)

    def source(self) -> dict[str, Any]:
        """What the oracles call `source`: rounded arrays and static options."""
        options = {n: o for n, o in self.options.items() if n != "vocab_chunk"}
        return {**self.arrays, **options}

    def length(self, gradient_of: str = "") -> int:
        """Terms of the longest sum on the way to a result."""
        if gradient_of in ("scale", "temperature"):
            return self.rows * self.classes
        return max(self.rows, self.classes, self.features)

    def check(self, actual: Mapping, gradients: Mapping, expected) -> None:
        """Values are float32 at least; gradients have the dtype of their argument."""
        computed = jnp.promote_types(self.dtype, jnp.float32)
        for name, value in actual.items():
            wanted = expected.values[name]
            assert value.shape == wanted.shape, name
            if jnp.issubdtype(value.dtype, jnp.floating):
                assert value.dtype == computed, name
                with labelled(name):
                    assert_agrees(value, wanted, computed, self.length())
            else:
                np.testing.assert_array_equal(value, wanted, err_msg=name)
        assert gradients.keys() == expected.gradients.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == self.arrays[name].dtype, name
            coarser = max(
                (computed, gradient.dtype), key=lambda t: float(jnp.finfo(t).eps)
            )
            with labelled(f"gradient of {name}"):
                wanted = expected.gradients[name]
                assert_agrees(gradient, wanted, coarser, self.length(name))


def as_jax(options: Mapping[str, Any]) -> dict[str, Any]:
    """NumPy arrays as arrays of JAX, which the library's annotations ask for."""
    return {
        name: jnp.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }


@contextlib.contextmanager
def labelled(name: str):
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


def ragged_chunk(classes: int, parts: int) -> int:
    """A size that gives at least `parts` chunks (or as many as there can be).

    The last one is short unless every size divides `classes`.
    """
    chunk = max(1, (classes - 1) // parts)
    while chunk > 1 and classes % chunk == 0:
        chunk -= 1
    return chunk


def assert_agrees(actual, oracle, dtype, length: int) -> None:
    """Float64 within 1e-12 of the largest value, the others within `assert_close`."""
    if jnp.dtype(dtype) == jnp.float64:
        actual = np.asarray(actual)
        finite = np.abs(oracle[np.isfinite(oracle)])
        bound = 1e-12 * np.max(finite, initial=1e-300)
        np.testing.assert_allclose(actual, oracle, rtol=0, atol=bound)
    else:
        assert_close(actual, oracle, dtype=dtype, length=length)


def values_and_gradients(
    function: Callable[..., Any],
    arrays: Mapping[str, Any],
    cotangents: Mapping[str, Any],
    **others: Any,
):
    """Runs `function(**arrays, **others) -> dict`, and pulls `cotangents` back.

    `others` are arrays without a derivative. Outputs without a cotangent get 0.
    """

    @jax.jit
    def run(arrays, cotangents, others):
        def floating(arrays):
            outputs = function(**arrays, **others)
            split = {True: {}, False: {}}
            for name, value in outputs.items():
                split[jnp.issubdtype(value.dtype, jnp.floating)][name] = value
            return split[True], split[False]

        values, pullback, rest = jax.vjp(floating, dict(arrays), has_aux=True)
        pulled = {
            name: jnp.asarray(cotangents[name], value.dtype)
            if name in cotangents
            else jnp.zeros_like(value)
            for name, value in values.items()
        }
        (gradients,) = pullback(pulled)
        return {**values, **rest}, gradients

    return run(dict(arrays), dict(cotangents), others)
