"""What oracles answer about functions of formed logits, in one form for all.

An answer has the values, and their gradients by the final logits and by the parameters
of the function, for given cotangents.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from softlib.logits._engine.sampling import key_words
from tests.logits.sources import BATCH, CLASSES, EXCLUDED, Source
from tests.oracles import (
    cross_entropy,
    ctc,
    divergences,
    edit_invariant,
    extreme,
    label_losses,
    robust_temperature,
    row_statistics,
    sampling,
    surprisal,
)
from tests.oracles.complex_step import slope
from tests.oracles.weighted_cross_entropy import target_of, weighted_cross_entropy

ROWS = ("plain", "dropped", "outside", "excluded")
DROPPED = (0, 1)
KEY = jax.random.key(5)
NGRAMS, FLOOR = (1, 2), -30.0
SMOOTHED: dict[str, Any] = {"label_smoothing": 0.2, "logsumexp_penalty": 0.1}
RANGE: dict[str, Any] = {"temperature_min": 0.02, "temperature_max": 50.0}
SDM: dict[str, Any] = {
    "similarity": np.arange(6).reshape(BATCH),
    "distance": np.linspace(0.2, 1, 6).reshape(BATCH),
}


class Rows:
    """What belongs to the rows of one call.

    Attributes:
        z: The final logits of each source, float64.
        class_where: Of all sources, or None.
        where: The rows that count, or None.
        labels: A class for each row.
        lists: Two classes for each row, of which those of `kept` count.
        cotangents: By the names of the results, when these are known.
    """

    def __init__(self, which: str, sources: Sequence[Source], takes_where: bool):
        random = np.random.default_rng(11)
        self.z = [source.z for source in sources]
        # All sources exclude the same classes, if they exclude any.
        masks = [s.class_where for s in sources if s.class_where is not None]
        self.class_where = masks[0] if masks else None
        self.columns = np.ones(CLASSES, bool) if not masks else masks[0]
        classes = np.flatnonzero(self.columns)
        draw = lambda: random.choice(classes, 2, replace=False)
        self.lists = np.array([draw() for _ in range(6)]).reshape(*BATCH, 2)
        self.kept = np.ones(self.lists.shape, bool)
        self.kept[0, 0, 1] = False
        self.where = None
        if which == "dropped" and takes_where:
            self.where = np.ones(BATCH, bool)
            self.where[DROPPED] = False
        if which == "dropped":
            self.lists[DROPPED] = -100
        if which == "outside":
            self.lists[0, 2, 0], self.lists[1, 0, 0] = CLASSES, -5
        if which == "excluded":
            self.lists[1, 1, 0] = EXCLUDED
        self.labels = self.lists[..., 0]
        # Masses of about 1 in all, so that no sum of a row cancels from much above.
        masses = random.uniform(size=(*BATCH, CLASSES)) * 2 / CLASSES
        self.distribution = masses * self.columns
        if which == "excluded":
            self.distribution[1, 1, EXCLUDED] = 0.5
        self.cotangents: dict[str, np.ndarray] = {}

    def with_cotangents(self, of_loss: np.ndarray) -> "Rows":
        changed = copy.copy(self)
        changed.cotangents = {"loss": of_loss}
        return changed

    @property
    def counts(self) -> np.ndarray:
        return np.ones(BATCH, bool) if self.where is None else self.where

    @property
    def inside(self) -> np.ndarray:
        return (self.labels >= 0) & (self.labels < CLASSES)

    @property
    def masks(self) -> dict[str, Any]:
        return {"where": self.where, "class_where": self.class_where}


class Answer(NamedTuple):
    """Results by name, and gradients: by each source's logits, and by parameter."""

    values: Mapping[str, Any]
    by_logits: Sequence[np.ndarray]
    by_parameter: Mapping[str, Any]


# --------------------------------------------------------------- answers of the oracles
def by_label(module_function: Any, loss: Any) -> Any:
    """A loss of rows with a label each, whose oracle has the form of all these."""

    def answer(rows: Rows, parameters: dict[str, Any]) -> Answer:
        rest = {n: p for n, p in parameters.items() if n != "class_weights"}
        more = {n: p for n, p in parameters.items() if n == "class_weights"}
        found = module_function(
            loss,
            rows.labels,
            rest,
            cotangent=rows.cotangents["loss"],
            logits=rows.z[0],
            **more,
            **rows.masks,
        )
        return _answer(found, parameters)

    return answer


def _answer(found: Any, parameters: Mapping[str, Any]) -> Answer:
    by_parameter = {name: found.gradients[name] for name in parameters}
    return Answer(found.values, [found.gradients["logits"]], by_parameter)


def metrics(
    names: Mapping[str, str] | None = None, *, labelled: bool = True, **options: Any
) -> Any:
    """The answer of `token_metrics`, whose fields some functions call otherwise.

    A row whose label is outside has no loss, and what else is asked of it depends on
    what asks: it has cotangent 0.
    """
    theirs = names or {}
    ours = {name: own for own, name in theirs.items()}

    def answer(rows: Rows, parameters: dict[str, Any]) -> Answer:
        usual = rows.inside if labelled else np.ones(BATCH, bool)
        found = cross_entropy.token_metrics(
            rows.labels if labelled else None,
            cotangents={
                theirs.get(n, n): np.where(usual, g, 0)
                for n, g in rows.cotangents.items()
            },
            logits=rows.z[0],
            **options,
            **rows.masks,
        )
        values = {ours.get(n, n): a for n, a in found.values.items() if n not in theirs}
        return Answer(values, [found.gradients["logits"]], {})

    return answer


def sequences(rows: Rows, parameters: dict[str, Any]) -> Answer:
    g = rows.cotangents["loss"]
    tokens = metrics({"loss": "log_prob"})
    per_token = lambda g: rows.with_cotangents(np.broadcast_to(g[:, None], BATCH))
    total = tokens(per_token(g), parameters).values["loss"].sum(-1)
    usual = np.where(np.isfinite(total), g, 0)
    return Answer({"loss": total}, tokens(per_token(usual), parameters).by_logits, {})


def of_targets(target: Callable[[Rows, dict[str, Any]], Any], **options: Any) -> Any:
    """Cross-entropy with what `target` makes: weights of classes and broken rows."""

    def answer(rows: Rows, parameters: dict[str, Any]) -> Answer:
        classes, broken = target(rows, parameters)
        found = weighted_cross_entropy(
            classes,
            broken=broken,
            cotangent=rows.cotangents["loss"],
            class_weights=parameters.get("class_weights"),
            logits=rows.z[0],
            **options,
            **rows.masks,
        )
        gradients = dict(found.gradients)
        if "label_weights" in parameters:
            places = np.clip(rows.lists, 0, CLASSES - 1)
            of_labels = np.take_along_axis(gradients["target"], places, -1)
            gradients["label_weights"] = np.where(rows.kept, of_labels, 0)
        return _answer(found._replace(gradients=gradients), parameters)

    return answer


def one_label(rows: Rows, parameters: dict[str, Any]) -> Any:
    return target_of(rows.labels[..., None], CLASSES, kept=rows.counts[..., None])


def several_labels(rows: Rows, parameters: dict[str, Any]) -> Any:
    weights = parameters.get("label_weights")
    return target_of(rows.lists, CLASSES, weights, rows.kept & rows.counts[..., None])


def distribution(rows: Rows, parameters: dict[str, Any]) -> Any:
    return rows.distribution, None


def summed(rows: Rows, parameters: dict[str, Any]) -> Answer:
    """The sum of weighted rows, from the loss of each."""
    g, weights = rows.cotangents["loss"], parameters["row_weights"]
    found = of_targets(one_label, **SMOOTHED)(rows.with_cotangents(g * weights), {})
    loss = found.values["loss"]
    with np.errstate(invalid="ignore"):
        value = np.where(rows.counts, weights * loss, 0).sum()
    by_row = g * np.where(rows.counts & (loss != np.inf), loss, 0)
    return Answer({"loss": value}, found.by_logits, {"row_weights": by_row})


def of_positives(loss: Any, **options: Any) -> Any:
    def answer(rows: Rows, parameters: dict[str, Any]) -> Answer:
        flat = lambda a: None if a is None else np.reshape(a, (6, *a.shape[2:]))
        ids = np.where(rows.kept, rows.lists, -1)
        loss_of_rows, dz, dw = extreme.losses_of(
            loss,
            flat(rows.z[0]),
            flat(ids),
            weights=flat(parameters.get("weights")),
            class_where=rows.class_where,
            where=flat(rows.where),
            **options,
        )
        g = rows.cotangents["loss"]
        by_weight = g[..., None] * dw.reshape(ids.shape)
        by_parameter = {"weights": by_weight} if "weights" in parameters else {}
        dz = g[..., None] * dz.reshape(rows.z[0].shape)
        return Answer({"loss": loss_of_rows.reshape(BATCH)}, [dz], by_parameter)

    return answer


def robust(rows: Rows, parameters: dict[str, Any]) -> Answer:
    tau, rho = parameters["temperature"], parameters["rho"]
    flat = lambda a: a.reshape(6, *a.shape[2:])
    loss, dz, dtau = robust_temperature.robust(
        flat(rows.z[0]),
        flat(rows.labels),
        flat(tau),
        rho,
        flat(rows.counts),
        rows.class_where,
    )
    g, usual = rows.cotangents["loss"], np.isfinite(loss).reshape(BATCH) & rows.counts
    slopes = {
        "temperature": g * dtau.reshape(BATCH),
        "rho": (g * tau)[usual].sum(),
    }
    dz = g[..., None] * dz.reshape(rows.z[0].shape)
    return Answer({"loss": loss.reshape(BATCH)}, [dz], slopes)


def sdm(rows: Rows, parameters: dict[str, Any]) -> Answer:
    """Cross-entropy to the base 2 + similarity, of logits times the distance."""
    log_base, d = np.log(2 + SDM["similarity"]), SDM["distance"]
    found = label_losses.label_loss(
        label_losses.comp_sum,
        rows.labels,
        {"tau": 1.0},
        cotangent=rows.cotangents["loss"],
        logits=rows.z[0] * (d * log_base)[..., None],
        **rows.masks,
    )
    dz = found.gradients["logits"] * d[..., None]
    return Answer({"loss": found.values["loss"] / log_base}, [dz], {})


def best_temperature(rows: Rows, parameters: dict[str, Any]) -> Answer:
    z, rho = rows.z[0][..., rows.columns].reshape(6, -1), parameters["rho"]
    tau = robust_temperature.best(z, rho, *RANGE.values())
    dz, drho = robust_temperature.best_slopes(z, tau)
    g, full = rows.cotangents["loss"], np.zeros(rows.z[0].shape)
    full[..., rows.columns] = g[..., None] * dz.reshape(*BATCH, -1)
    slopes = {"rho": (g * drho.reshape(BATCH)).sum()}
    return Answer({"loss": tau.reshape(BATCH)}, [full], slopes)


def statistics(rows: Rows, parameters: dict[str, Any]) -> Answer:
    z, where = rows.z[0], rows.class_where
    cotangents = {
        n: g
        for n, g in rows.cotangents.items()
        if n in (*row_statistics.DIFFERENTIABLE, "sum_softplus")
    }
    found = row_statistics.row_statistics(
        rows.labels, where, cotangents=cotangents, logits=z
    )
    values = {**found.values, "label_rank": _ranks(rows)}
    return Answer(values, [found.gradients["logits"]], {})


def ranks(rows: Rows, parameters: dict[str, Any]) -> Answer:
    found = np.where(rows.counts, _ranks(rows), 0)
    return Answer({"loss": found}, [np.zeros(rows.z[0].shape)], {})


def _ranks(rows: Rows) -> np.ndarray:
    """CLASSES for a label that is no class."""
    order = np.argsort(-_there(rows), axis=-1, kind="stable")
    places = np.argsort(order, axis=-1)
    label = np.where(rows.inside, rows.labels, 0)
    found = np.take_along_axis(places, label[..., None], -1)[..., 0]
    return np.where(rows.inside & rows.columns[label], found, CLASSES)


def _there(rows: Rows) -> np.ndarray:
    return np.where(rows.columns, rows.z[0], -np.inf)


def gathered(rows: Rows, parameters: dict[str, Any]) -> Answer:
    ids, g = np.where(rows.kept, rows.lists, 0), rows.cotangents["loss"]
    inside = (ids >= 0) & (ids < CLASSES)
    place = np.where(inside, ids, 0)
    found = np.take_along_axis(_there(rows), place, -1)
    dz = np.zeros(rows.z[0].shape)
    for row in np.ndindex(*ids.shape):
        if inside[row] and rows.columns[ids[row]]:
            dz[(*row[:-1], ids[row])] += g[row]
    return Answer({"loss": np.where(inside, found, np.nan)}, [dz], {})


def greatest(rows: Rows, parameters: dict[str, Any]) -> Answer:
    there = _there(rows)
    classes = np.argsort(-there, axis=-1, kind="stable")[..., :3]
    logits = np.take_along_axis(there, classes, -1)
    return Answer({"logits": logits, "classes": classes}, [np.zeros(there.shape)], {})


def drawn(rows: Rows, parameters: dict[str, Any]) -> Answer:
    classes, margin = sampling.sample(_there(rows), np.asarray(key_words(KEY)))
    assert (margin > 1e-3).all()  # rounding decides nothing
    return Answer({"loss": classes}, [np.zeros(rows.z[0].shape)], {})


def surprisals(rows: Rows, parameters: dict[str, Any]) -> Answer:
    names = ("mean", "variance", "third", "fourth")
    values = dict(zip(names, surprisal.moments(_there(rows)), strict=True))
    return Answer(values, [np.zeros(rows.z[0].shape)], {})


def edits(rows: Rows, parameters: dict[str, Any]) -> Answer:
    targets, kept = rows.lists[:, 0], rows.kept[:, 0]
    outside = kept & ((targets < 0) | (targets >= CLASSES))
    bad, g = outside.any(-1), np.where(outside.any(-1), 0, rows.cotangents["loss"])
    weights = parameters["weights"]

    def each(z: Any, weights: Any) -> Any:
        return np.array(
            [
                edit_invariant.loss(
                    z[b],
                    np.where(outside[b], 0, targets[b]),
                    NGRAMS,
                    weights,
                    "softmax",
                    FLOOR,
                    rows.counts[b],
                    kept[b],
                )
                for b in range(BATCH[0])
            ]
        )

    there = _there(rows)
    loss = np.where(bad, np.nan, each(there, weights))
    dz = slope(lambda z: (g * each(z, weights)).sum(), there)
    by_weight = slope(lambda w: (g * each(there, w)).sum(), weights)
    return Answer({"loss": loss}, [dz], {"weights": by_weight})


def alignments(rows: Rows, parameters: dict[str, Any]) -> Answer:
    targets, kept = rows.lists[:, 0], rows.kept[:, 0]
    outside = kept & ((targets < 1) | (targets >= CLASSES))  # 0 is the blank
    bad, there = outside.any(-1), _there(rows)

    def each(z: Any) -> Any:
        return np.array(
            [
                ctc.loss(z[b][rows.counts[b]], () if bad[b] else targets[b][kept[b]], 0)
                for b in range(BATCH[0])
            ]
        )

    g, loss = rows.cotangents["loss"], each(there)
    g = np.where(bad | np.isinf(loss), 0, g)
    safe = lambda loss: np.where(np.isinf(loss), 0, loss)
    dz = slope(lambda z: (g * safe(each(z))).sum(), there)
    return Answer({"loss": np.where(bad, np.nan, loss)}, [dz], {})


# ------------------------------------------------------------------ of pairs of sources
def divergence(formula: Any, **options: Any) -> Any:
    def answer(rows: Rows, parameters: dict[str, Any]) -> Answer:
        own, target = ({"logits": z} for z in rows.z)
        excluded = None
        if formula is not divergences.cross_entropy:
            excluded = rows.labels[..., None]
        value, by_own, by_target, by_mixture = divergences.divergence(
            formula,
            own,
            target,
            class_where=rows.class_where,
            where=rows.where,
            excluded_labels=excluded,
            mixture=parameters.get("mixture"),
            cotangent=rows.cotangents["loss"],
            **options,
        )
        slopes = {"mixture": by_mixture} if parameters else {}
        by_logits = [by_own["logits"], by_target["logits"]]
        return Answer({"loss": value}, by_logits, slopes)

    return answer


def mean_divergence(rows: Rows, parameters: dict[str, Any]) -> Answer:
    g, counts = rows.cotangents["loss"], rows.counts.sum(-1)
    own, reference = ({"logits": z} for z in rows.z)
    value, by_own, _, _ = divergences.divergence(
        divergences.kl,
        own,
        reference,
        reverse=True,
        class_where=rows.class_where,
        where=rows.where,
        cotangent=np.broadcast_to((g / counts)[:, None], BATCH),
    )
    constant = np.zeros(rows.z[1].shape)
    return Answer({"loss": value.sum(-1) / counts}, [by_own["logits"], constant], {})


def of_matrices(
    usual: Any, excluded: Any = None, *, labelled: bool = True, constant: bool = True
) -> Any:
    """Differentiates values of matrices of logits by complex steps.

    `usual` are those of rows with a label among the classes, `excluded` those of rows
    whose label is none of them. A constant teacher has no gradient.
    """

    def answer(rows: Rows, parameters: dict[str, Any]) -> Answer:
        z = [a[..., rows.columns].reshape(6, -1) for a in rows.z]
        counts, inside = rows.counts.reshape(6), rows.inside.reshape(6) | (not labelled)
        label = np.where(inside & labelled, rows.labels.reshape(6), 0)
        there = rows.columns[label] | (not labelled)
        place = np.searchsorted(np.flatnonzero(rows.columns), label)
        g = rows.cotangents["loss"].reshape(6)

        def each(z: Any, parameters: dict[str, Any]) -> Any:
            numbers = [*z, *map(np.asarray, parameters.values())]
            found = np.zeros(6, np.result_type(*numbers))
            rest, some = counts & inside & ~there, counts & inside & there
            take = lambda mask: [a[mask] for a in z]
            found[some] = usual(*take(some), place[some], **parameters)
            if rest.any():
                found[rest] = excluded(*take(rest), **parameters)
            return found

        loss = np.where(counts & ~inside, np.nan, each(z, parameters))

        def total(z: Any, parameters: dict[str, Any]) -> Any:
            found = each(z, parameters)
            return (g * np.where(np.isfinite(found), found, 0)).sum()

        by_logits = []
        for i, own in enumerate(z):
            full = np.zeros(rows.z[i].shape)
            if not (i and constant):
                moved = lambda a, i=i: total([*z[:i], a, *z[i + 1 :]], parameters)
                full[..., rows.columns] = slope(moved, own).reshape(*BATCH, -1)
            by_logits.append(full)
        slopes = {
            name: slope(lambda p, n=name: total(z, {**parameters, n: p}), value)
            for name, value in parameters.items()
        }
        return Answer({"loss": loss.reshape(BATCH)}, by_logits, slopes)

    return answer


def _heated(formula: Any, z: Any, teacher: Any, temperature: Any) -> Any:
    every = np.ones(z.shape, bool)
    q, p = (row_statistics.softmax(a / temperature, every)[0] for a in (z, teacher))
    return temperature**2 * formula(p, q)[0]


def plain_distillation(z: Any, teacher: Any, labels: Any, temperature: Any) -> Any:
    return _heated(divergences.kl, z, teacher, temperature)


def normalized_without_label(z: Any, teacher: Any, temperature: Any, gamma: Any) -> Any:
    return gamma * _heated(divergences.cross_entropy, z, teacher, temperature)


def decoupled_without_label(
    z: Any, teacher: Any, alpha: Any, beta: Any, temperature: Any
) -> Any:
    return beta * _heated(divergences.kl, z, teacher, temperature)


# ---------------------------------------------------------------------------- of scores
def sequence_nll(rows: Rows, parameters: dict[str, Any]) -> Answer:
    found = sequences(rows.with_cotangents(-rows.cotangents["loss"]), parameters)
    return Answer({"loss": -found.values["loss"]}, found.by_logits, {})


def of_likeliest(answer: Any) -> Any:
    """The answer for the likeliest class of each row as its label."""

    def changed(rows: Rows, parameters: dict[str, Any]) -> Answer:
        rows = copy.copy(rows)
        rows.labels = _there(rows).argmax(-1)
        return answer(rows, parameters)

    return changed


def sequence_entropy(rows: Rows, parameters: dict[str, Any]) -> Answer:
    g = np.broadcast_to(rows.cotangents["loss"][:, None], BATCH)
    each = metrics({"loss": "entropy"}, labelled=False)
    found = each(rows.with_cotangents(g), parameters)
    return Answer({"loss": found.values["loss"].sum(-1)}, found.by_logits, {})


def entropy_test(rows: Rows, parameters: dict[str, Any]) -> Answer:
    surprisals = metrics()(rows.with_cotangents(np.zeros(BATCH)), {}).values["loss"]
    mean, variance = surprisal.moments(_there(rows), 2)
    mean, variance = np.where(rows.counts, mean, 0), np.where(rows.counts, variance, 0)
    length = rows.counts.sum(-1)
    count, excess = np.maximum(length, 1), (surprisals - mean).sum(-1)
    values = {
        "difference": excess / count,
        "z": excess / np.sqrt(variance.sum(-1)),
        "log_perplexity": surprisals.sum(-1) / count,
        "entropy": mean.sum(-1) / count,
        "length": length,
    }
    return Answer(values, [np.zeros(rows.z[0].shape)], {})


def log_ratios(rows: Rows, parameters: dict[str, Any]) -> Answer:
    """Codes of the classes of `codes_of`."""
    ids, g = codes_of(rows)["class_ids"], rows.cotangents["loss"]
    z, dz = rows.z[0][..., ids], np.zeros(rows.z[0].shape)
    dz[..., ids[1:]] = g
    dz[..., ids[0]] = -g.sum(-1)
    return Answer({"loss": z[..., 1:] - z[..., :1]}, [dz], {})


def codes_of(rows: Rows) -> dict[str, Any]:
    return {"class_ids": np.flatnonzero(rows.columns)[3:8]}


def two_models(rows: Rows, parameters: dict[str, Any]) -> Answer:
    """Of the first source and of the other one."""
    other = copy.copy(rows)
    other.z = rows.z[::-1]
    length = rows.counts.sum(-1)
    count = np.maximum(length, 1)
    per_token = lambda g: np.broadcast_to((g / count)[:, None], BATCH)
    zero = np.zeros(BATCH)
    both = [metrics()(each.with_cotangents(zero), {}) for each in (rows, other)]
    own_loss, other_loss = (found.values["loss"] for found in both)
    with np.errstate(invalid="ignore"):
        ratio = (other_loss - own_loss).sum(-1) / count
    g = np.where(np.isfinite(ratio), rows.cotangents["log_ratio"], 0)
    by_own = metrics()(rows.with_cotangents(per_token(-g)), {}).by_logits[0]
    by_other = metrics()(other.with_cotangents(per_token(g)), {}).by_logits[0]
    values = {"log_ratio": ratio, "length": length}
    for name, sign, (p, q) in (
        ("expected", 1, (rows.z[0], rows.z[1])),
        ("expected_other", -1, (rows.z[1], rows.z[0])),
    ):
        value, by_q, by_p, _ = divergences.divergence(
            divergences.kl,
            {"logits": q},
            {"logits": p},
            class_where=rows.class_where,
            where=rows.where,
            cotangent=per_token(sign * rows.cotangents[name]),
        )
        values[name] = sign * value.sum(-1) / count
        first, second = (by_p, by_q) if sign > 0 else (by_q, by_p)
        by_own, by_other = by_own + first["logits"], by_other + second["logits"]
    return Answer(values, [by_own, by_other], {})
