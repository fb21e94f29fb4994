"""Every kind of logits from random arrays, and what the definition makes of these.

The definition is NumPy in float64: the oracle of row statistics follows a gradient from
the final logits to hidden, weight and modifiers, and here it goes on to a codebook or
to the factors of a low-rank change, or to the scales and zeros of a quantized weight.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

import softlib
from softlib.logits import LoRALogits, QuantizedLogits, StoredLogits, VQLogits
from softlib.quantize import QuantizedArray
from tests.host import jnp
from tests.oracles.row_statistics import evaluate, exact

BATCH, FEATURES, RANK, CODES, CLASSES = (2, 3), 5, 2, 6, 23
KINDS = ("array", "stored", "rows", "columns", "codes", "lora")
STORED = KINDS[:2]
MODIFIERS = ("none", "bias and softcap", "scale and temperature", "class_where")
# Four of five blocks of classes are whole, two of three of codes, one of two of rows.
CHUNKS = {"vocab_chunk": 5, "token_chunk": 4}
SOFTCAP = 3.0
EXCLUDED = 7  # by `class_where`, among others


class Source:
    """Logits of one kind.

    Attributes:
        arrays: Differentiable, by the names of the arguments of the value.
        z: The final logits of the rounded arrays, float64 (*BATCH, CLASSES).
        class_where: Of the value, or None.
    """

    def __init__(
        self, kind: str, case: Mapping[str, Any], *, seed: int = 0, heated: bool = True
    ):
        """Draws the arrays.

        Args:
            kind: One of `KINDS`, or a "grid" of few bits.
            case: With `dtype`, `modifiers`, `chunks` and `implementation`.
            seed: Another one has other arrays, and more features.
            heated: Whether there may be a temperature, which some functions have.
        """
        random = np.random.default_rng(seed)
        self.kind = kind
        features = FEATURES + seed
        arrays = _arrays(kind, random.normal, features)
        bias, scale = random.normal(size=CLASSES), random.uniform(0.5, 1.5)
        temperature = random.uniform(0.5, 1.5, BATCH)
        # On a grid of 3 bits.
        self.steps = np.random.default_rng(seed).integers(0, 8, (CLASSES, features))
        self.mapping = random.integers(0, CODES - 1, CLASSES)  # the last has no token
        # Of all seeds: two distributions are over the same classes.
        exists = np.random.default_rng(4).uniform(size=CLASSES) < 0.7
        exists[[0, EXCLUDED]] = True, False
        self.class_where, self.softcap = None, None
        modifiers = "none" if kind == "array" else case["modifiers"]
        if modifiers == "bias and softcap":
            arrays["token_bias" if kind == "codes" else "bias"] = bias
            self.softcap = SOFTCAP
        elif modifiers == "scale and temperature":
            arrays["scale"] = np.asarray(scale)
            if heated:
                arrays["temperature"] = temperature
        elif modifiers == "class_where":
            self.class_where = exists
        self.options = {"implementation": case["implementation"]}
        if case["chunks"] and kind not in STORED:
            self.options |= CHUNKS
        self.arrays = {n: jnp.asarray(a, case["dtype"]) for n, a in arrays.items()}
        self.exact = {n: exact(a) for n, a in self.arrays.items()}
        self.z = self._evaluate(np.zeros((*BATCH, CLASSES))).values["z"]

    def value(self, arrays: Mapping[str, Any]) -> Any:
        """The logits of these arrays, which have the names of `self.arrays`."""
        given = dict(arrays)
        if self.kind == "array":
            return given["logits"]
        where = self.class_where
        options: dict[str, Any] = {
            **self.options,
            "softcap": self.softcap,
            "class_where": None if where is None else jnp.asarray(where),
        }
        if self.kind == "stored":
            return StoredLogits(**given, **options)
        if self.kind == "codes":
            return VQLogits(mapping=jnp.asarray(self.mapping), **given, **options)
        if self.kind == "lora":
            return LoRALogits(**given, **options)
        if self.kind == "grid":
            parts = {"scale": given.pop("step"), "zero": given.pop("zero")}
            weight = QuantizedArray(jnp.asarray(self.steps), bits=3, **parts)
            return QuantizedLogits(weight=weight, **given, **options)
        axis = int(self.kind == "columns")
        return softlib.LinearLogits(vocab_axis=axis, **given, **options)

    def poisoned(self, row: tuple[int, ...]) -> dict[str, Any]:
        """The arrays, with NaN in whatever belongs to that row alone."""
        given = dict(self.arrays)
        for name in ("logits", "hidden"):
            if name in given:
                given[name] = given[name].at[row].set(jnp.nan)
        return given

    def gradients(self, dz: np.ndarray) -> dict[str, np.ndarray]:
        """Of each array, from the gradient of the final logits."""
        found = dict(self._evaluate(dz).gradients)
        if self.kind == "codes":
            per_token = found.pop("weight")
            found["codebook"] = np.zeros((CODES, per_token.shape[1]))
            np.add.at(found["codebook"], self.mapping, per_token)
            if "token_bias" in self.exact:
                found["token_bias"] = dz.reshape(-1, CLASSES).sum(0)
        if self.kind == "lora":
            of_weight, a, b = (
                found["weight"],
                self.exact["lora_a"],
                self.exact["lora_b"],
            )
            scale = self.exact["lora_scale"]
            found["lora_a"] = scale * (b @ of_weight).T
            found["lora_b"] = scale * (of_weight @ a).T
            found["lora_scale"] = (of_weight * (a @ b).T).sum()
        if self.kind == "grid":  # one group per class
            of_weight = found.pop("weight")
            found["step"] = (of_weight * self.steps).sum(1, keepdims=True)
            found["zero"] = of_weight.sum(1, keepdims=True)
        return found

    def _evaluate(self, dz: np.ndarray) -> Any:
        names = {"bias", "scale", "temperature", "logits", "hidden", "weight"}
        given = {n: a for n, a in self.exact.items() if n in names}
        if self.kind == "codes":
            given["weight"] = self.exact["codebook"][self.mapping]
        if self.kind == "lora":
            factors = (self.exact[n] for n in ("lora_a", "lora_b", "lora_scale"))
            a, b, scale = factors
            given["weight"] = given["weight"] + scale * (a @ b).T
        if self.kind == "grid":
            decoded = self.exact["step"] * self.steps + self.exact["zero"]
            given["weight"] = exact(jnp.asarray(decoded, self.arrays["step"].dtype))
        after = self.exact.get("token_bias", 0.0)  # after softcap and temperature
        return evaluate(
            lambda z, dz: ({"z": z + after}, dz),
            {"dz": dz},
            vocab_axis=int(self.kind == "columns"),
            softcap=self.softcap,
            **given,
        )


def _arrays(kind: str, normal: Any, features: int) -> dict[str, np.ndarray]:
    """Logits of a standard deviation of about 1.5."""
    size = 1.5 / np.sqrt(features)
    if kind in STORED:
        return {"logits": 1.5 * normal(size=(*BATCH, CLASSES))}
    arrays = {"hidden": normal(size=(*BATCH, features))}
    if kind == "codes":
        return {**arrays, "codebook": size * normal(size=(CODES, features))}
    if kind == "grid":
        step = 0.4 * size * (1 + 0.2 * normal(size=(CLASSES, 1)))
        return {**arrays, "step": step, "zero": -3.5 * step}
    weight = size * normal(size=(CLASSES, features))
    arrays["weight"] = weight.T if kind == "columns" else weight
    if kind == "lora":
        arrays["lora_a"] = size * normal(size=(features, RANK))
        arrays["lora_b"] = normal(size=(RANK, CLASSES))
        arrays["lora_scale"] = np.asarray(0.7)
    return arrays
