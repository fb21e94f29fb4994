"""Every public function takes ids of every integer dtype."""

from typing import Any

import jax
import numpy as np
import pytest

from softlib._array_arguments import ArrayKind, argument_kinds
from tests import example_calls
from tests.host import jnp

DTYPES = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
LABELS, POSITIVES = jnp.array([2, 0]), jnp.array([[0]])
EXCLUDED = {"excluded_labels": jnp.array([1, 0])}
ROW = jnp.log(jnp.array([0.5, 0.9]))
STEPS = {"level": "step", "segment_ids": jnp.array([7, 9])}

# What to add to the call in the docstring, where that has another kind of labels.
ADDED: dict[str, dict[str, Any]] = {
    "logits.row_statistics": {"labels": LABELS, "statistics": ("label_rank",)},
    "logits.token_surprisals": {"labels": jnp.array([1])},
    "decoding.speculative_generate": {
        "prompt": jnp.array([[1, 0]]),
        "prompt_lengths": jnp.array([1]),
    },
    "losses.decoupled_softmax_loss": {"positives": POSITIVES},
    "losses.future_tokens": {"segment_ids": jnp.array([[0, 0, 1]])},
    "losses.one_versus_all_loss": {"positives": POSITIVES},
    "losses.oreo_policy_loss": STEPS
    | {
        "log_prob": ROW,
        "reference_log_prob": ROW,
        "values": ROW,
        "rewards": 1.0,
        "beta": 0.1,
    },
    "losses.oreo_value_loss": STEPS,
    "losses.soft_top_k_loss": {"positives": POSITIVES},
    "losses.softmax_jensen_shannon_divergence": EXCLUDED,
    "losses.softmax_kl_divergence": EXCLUDED,
    "losses.softmax_soft_target_cross_entropy": EXCLUDED,
    "nn.codebook_ema_update": {"weights": jnp.array([1, 3])},
    "quantize.kmeans": {"weights": jnp.array([1, 2, 3, 4])},
    "numerics.similarity_depth": {"exclude_index": jnp.array([1])},
    "softmax.straight_through_one_hot": {"index": jnp.array(1)},
}


# Numbers that may be integers: a large one is meant, not out of a range.
NUMBERS = (
    "weights",
    "counts",
    "small_correct",
    "large_correct",
    "chosen_lengths",
    "rejected_lengths",
)


def integer_arguments() -> dict[str, list[str]]:
    """The arguments that may be ids, told by the signature, of each function."""
    found = {
        address.removeprefix("softlib."): [
            name
            for name, kind in argument_kinds(function).items()
            if isinstance(kind, ArrayKind) and kind.integer and name not in NUMBERS
        ]
        for address, function in example_calls.functions().items()
    }
    found.pop("masked_mean")  # of numbers, which may be floating
    return {address: names for address, names in found.items() if names}


def outcome(call: example_calls.Call, **changed: Any) -> Any:
    """The results as arrays of NumPy, or the error: known ids may be refused."""
    try:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(call(**changed))]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("address", integer_arguments())
def test_ids_of_every_dtype_mean_the_same_in_every_function(address):
    call = example_calls.of(f"softlib.{address}").replaced(**ADDED.get(address, {}))
    for name in integer_arguments()[address]:
        known = np.asarray(call.arguments[name])
        assert np.issubdtype(known.dtype, np.integer)
        wanted: dict[bytes, Any] = {}
        for dtype in DTYPES:
            last = np.iinfo(dtype).max
            ids = [int(one) for one in known.flat[:-1]] + [int(last)]
            least = 0 if dtype[0] == "u" else -1
            ids = np.array([max(one, least) for one in ids], dtype)
            found = outcome(call, **{name: ids.reshape(known.shape)})
            held = np.array([min(int(one), 2**31 - 1) for one in ids])
            held = held.astype("int32")
            if (key := held.tobytes()) not in wanted:
                wanted[key] = outcome(call, **{name: held.reshape(known.shape)})
            jax.tree.map(np.testing.assert_array_equal, found, wanted[key])
        narrow = known.astype("uint8" if known.min() >= 0 else "int8")
        found, same = (outcome(call, **{name: ids}) for ids in (narrow, known))
        jax.tree.map(np.testing.assert_array_equal, found, same)
