"""Scalars may be what their range says, its ends included, and nothing beyond."""

import inspect
import math

import jax
import pytest

from softlib import _checks
from tests import example_calls
from tests.host import jnp

# By the argument, or by the function and the argument where that has another range.
RANGES: dict[str, tuple[float, float]] = {
    "a": (0, math.inf),
    "alpha": (0, math.inf),
    "b": (-math.inf, math.inf),
    "bias": (-math.inf, math.inf),
    "beta": (0, math.inf),
    "clip_high": (0, math.inf),
    "clip_low": (0, 1),
    "decay": (0, 1),
    "desirable_weight": (0, math.inf),
    "eps": (0, math.inf),
    "error": (0, 1),
    "epsilon": (0, math.inf),
    "floor": (-math.inf, 0),
    "gamma": (0, math.inf),
    "flip_rate": (0, math.nextafter(0.5, 0)),
    "guidance_scale": (-math.inf, math.inf),
    "key2_bias": (-math.inf, math.inf),
    "kl_weight": (0, math.inf),
    "l2": (0, math.inf),
    "label_smoothing": (0, 1),
    "learning_rate": (0, math.inf),
    "likelihood_weight": (0, math.inf),
    "log_zero": (-math.inf, 0),
    "length_power": (0, math.inf),
    "logsumexp_penalty": (0, math.inf),
    "margin": (0, math.inf),
    "min_scale": (0, math.inf),
    "mixture": (0, 1),
    "mu": (0, math.inf),
    "noise_floor": (0, math.inf),
    "nu": (0, math.inf),
    "num_samples": (1, math.inf),
    "q": (0, math.inf),
    "radius": (0, math.inf),
    "reference_point": (-math.inf, math.inf),
    "rho": (0, math.inf),
    "step_size": (0, math.inf),
    "t1": (-math.inf, 2),
    "tau": (0, math.inf),
    "temperature": (0, math.inf),
    "threshold": (0, 1),
    "scale": (-math.inf, math.inf),
    "temperature_max": (0, math.inf),
    "temperature_min": (0, math.inf),
    "undesirable_weight": (0, math.inf),
    "value2_bias": (-math.inf, math.inf),
    "var_smoothing": (0, math.inf),
    "width": (0, math.inf),
    "weight_decay": (0, math.inf),
    "decoding.cold_stop.threshold": (0, math.inf),
    "estimation.log_graph_proximity.t": (0, math.inf),
    "estimation.pn_criterion.bayes_error": (0, 0.5),
    "estimation.sketched_lstsq.delta": (0, 1),
    "losses.dpo_loss.label_smoothing": (0, 0.5),
    "losses.mcmi_loss.weight": (0, math.inf),
    "estimation.fit_sdm_calibration.level": (0, 1),
    "losses.poly1_cross_entropy.epsilon": (-1, math.inf),
    "losses.poly1_from_log_prob.epsilon": (-1, math.inf),
    "metrics.label_propensities.b": (0, math.inf),
    "numerics.dkw_radius.alpha": (0, 1),
    "scoring.activation_ratio.threshold": (0, math.inf),
    "scoring.benchmark_leakage.threshold": (-math.inf, math.inf),
    "scoring.route_by_uncertainty.threshold": (-math.inf, math.inf),
    "scoring.similar_groups.threshold": (-math.inf, math.inf),
    "scoring.tail_truncation_error.threshold": (0, math.inf),
    "scoring.truncate_activations.threshold": (0, math.inf),
    "numerics.reshape_distribution.strength": (0, 1),
    "softmax.min_p_logits.p": (0, 1),
    "softmax.top_p_logits.p": (0, 1),
}


def functions_of_scalars() -> list[str]:
    """Those with a number for all rows that may be an array, and those of the table."""
    return [
        address
        for address, function in (
            (address.removeprefix("softlib."), function)
            for address, function in example_calls.functions().items()
        )
        if any(
            f"{address}.{name}" in RANGES or str(parameter.annotation) == "Scalar"
            for name, parameter in inspect.signature(function).parameters.items()
        )
    ]


@pytest.mark.parametrize("address", functions_of_scalars())
def test_the_range_of_a_scalar_is_what_it_is_by_definition(address, monkeypatch):
    """Whatever a call checks; that the ends belong to a range is tested elsewhere."""
    checked: dict[str, set[tuple[float, float]]] = {}

    def require_scalar(function, name, value, least, most):
        checked.setdefault(name, set()).add((least, most))

    monkeypatch.setattr(_checks, "require_scalar", require_scalar)
    call = example_calls.of(f"softlib.{address}")
    jax.eval_shape(call.split()[0], call.split()[1])
    for name, ranges in checked.items():
        assert ranges == {RANGES.get(f"{address}.{name}", RANGES.get(name))}, name


def test_the_table_of_ranges_has_no_function_too_many():
    known = functions_of_scalars()
    assert {name.rpartition(".")[0] for name in RANGES if "." in name} <= {*known}


def test_ends_of_a_range_belong_to_it():
    for inside in (0, 0.5, 1, -0.0, jnp.float32(7)):
        _checks.require_scalar("f", "x", inside, 0, 1)
    for outside in (-1e-9, 1.0001, math.nan):
        with pytest.raises(ValueError, match=r"f: `x` must be in \[0, 1\], got"):
            _checks.require_scalar("f", "x", outside, 0, 1)
    with pytest.raises(ValueError, match="f: `x` must be >= 0, got -1"):
        _checks.require_scalar("f", "x", -1, 0, math.inf)
