"""Rules that accept predictions or not; all see the same network and calibration."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from softlib import softmax
from softlib.estimation import fit_sdm_calibration, sdm_estimate

from .network import CLASSES, Seen, Verified

# From what the network says of images to a boolean per image.
type Rule = Callable[[Seen], np.ndarray]


def fit(network: Verified, level: float) -> dict[str, Rule]:
    """The rules by name, fitted to the calibration images."""
    seen, labels = network.calibration, network.calibration_labels
    confidence = lambda s: np.asarray(jax.nn.softmax(s.logits).max(-1))
    right = np.asarray(seen.logits.argmax(-1)) == labels
    temperature = fitted_temperature(np.asarray(seen.logits), labels)
    warmed = lambda s: np.asarray(jax.nn.softmax(s.logits / temperature).max(-1))
    least = selective_threshold(confidence(seen), right, level)
    far = np.quantile(np.asarray(seen.nearest), level)
    near = lambda s: np.asarray(s.nearest) <= far
    chosen = lambda s: confidence(s) >= least
    sdm = lambda s: softmax.sdm(s.logits, s.similarity, s.distance)
    calibrated = fit_sdm_calibration(
        sdm(seen), seen.similarity, jnp.asarray(labels), level=level
    )
    estimate = lambda s: sdm_estimate(calibrated, sdm(s), s.similarity)

    def without_bands(s: Seen) -> np.ndarray:
        found = estimate(s)
        place = found.predictions[:, None]
        own = jnp.take_along_axis(found.probabilities, place, -1)[:, 0]
        enough = own >= calibrated.thresholds[found.predictions]
        similar = found.similarity >= calibrated.least_similarity
        return np.asarray(enough & similar)

    plain = lambda s: np.asarray(sdm(s).max(-1)) >= level
    with_bands = lambda s: np.asarray(estimate(s).accepted)

    def as_many(share: float) -> Rule:
        """The surest of the near ones, as many calibration images as that share."""
        sure = np.where(near(seen), warmed(seen), 0)
        above = np.quantile(sure, 1 - share)
        return lambda s: near(s) & (warmed(s) >= above)

    return {
        "softmax": lambda s: confidence(s) >= level,
        "softmax, temperature": lambda s: warmed(s) >= level,
        "softmax, threshold": chosen,
        "conformal": conformal(seen, labels, level),
        "SDM": plain,
        "softmax, near, as many": as_many(plain(seen).mean()),
        "SDM, calibrated": without_bands,
        "SDM, calibrated, bands": with_bands,
        "softmax, near, as few": as_many(with_bands(seen).mean()),
    }


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The divisor of logits of the least cross-entropy on the calibration images."""

    def loss(log_temperature: float) -> float:
        z = logits / np.exp(log_temperature)
        log_p = jax.nn.log_softmax(z)
        return -float(np.take_along_axis(np.asarray(log_p), labels[:, None], 1).mean())

    found = optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    return float(np.exp(found.x))


def selective_threshold(
    confidence: np.ndarray, right: np.ndarray, level: float
) -> float:
    """The least confidence from which on that share of predictions is right."""
    order = np.argsort(-confidence)
    accuracy = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    serves = confidence[order][accuracy >= level]
    return float(serves.min()) if len(serves) else np.inf


def conformal(seen: Seen, labels: np.ndarray, level: float) -> Rule:
    """Accepts where the set of possible classes, of coverage `level` each, is one."""
    p = np.asarray(jax.nn.softmax(seen.logits))
    limits = np.zeros(CLASSES)
    for c in range(CLASSES):
        scores = np.sort(1 - p[labels == c, c])
        rank = int(np.ceil(level * (len(scores) + 1)))
        limits[c] = scores[rank - 1] if rank <= len(scores) else 1.0

    def accepts(s: Seen) -> np.ndarray:
        return ((1 - np.asarray(jax.nn.softmax(s.logits))) <= limits).sum(-1) == 1

    return accepts
