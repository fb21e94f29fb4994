"""Every public function of logits, with its oracle at some choice of its options.

Functions of one family ask a head for the same numbers, so that they share compiled
programs.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import softlib
from tests.heads import function_of, logits_of
from tests.host import jnp
from tests.logits import answers
from tests.logits.answers import Answer, Rows
from tests.logits.sources import BATCH, CLASSES
from tests.oracles import divergences, extreme, label_losses, spherical

WEIGHTS = np.linspace(0.5, 2.0, CLASSES)
PER_ROW = np.linspace(0.4, 1.7, 6).reshape(BATCH)
PER_LABEL = np.linspace(0.5, 1.5, 12).reshape(*BATCH, 2)


@dataclasses.dataclass(frozen=True)
class Function:
    """A public function with its oracle, at one choice of its options.

    Attributes:
        name: In softlib.losses, softlib.logits or softlib.scoring.
        oracle: Told the rows and the parameters.
        arguments: Arrays by name, without a derivative.
        options: Static arguments.
        parameters: Differentiable numbers.
        heated: Whether the logits may have a temperature of their own.
        finish: Makes an array, or results by name, of what is returned.
    """

    name: str
    oracle: Callable[[Rows, dict[str, Any]], Answer]
    arguments: Callable[[Rows], dict[str, Any]] = lambda rows: {}
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    heated: bool = True
    finish: Callable[[Any], Any] = lambda found: found

    @property
    def takes_where(self) -> bool:
        return "where" in inspect.signature(function_of(self.name)).parameters

    def call(self, rows: Rows, values: Sequence[Any], parameters: Any) -> dict:
        """The results by name."""
        function = function_of(self.name)
        given = self.arguments(rows)
        if rows.where is not None:
            given["where"] = rows.where
        arrays = {
            name: jnp.asarray(a) if isinstance(a, np.ndarray) else a
            for name, a in given.items()
        }
        named = dict(zip(logits_of(function), values, strict=True))
        found = self.finish(function(**named, **arrays, **self.options, **parameters))
        if hasattr(found, "_asdict"):
            return {n: a for n, a in found._asdict().items() if a is not None}
        return found if isinstance(found, dict) else {"loss": found}


def _labels(rows: Rows) -> dict[str, Any]:
    return {"labels": rows.labels}


def _lists(rows: Rows) -> dict[str, Any]:
    return {"labels": np.where(rows.kept, rows.lists, -100), "label_where": rows.kept}


def _positives(rows: Rows) -> dict[str, Any]:
    return {"positives": np.where(rows.kept, rows.lists, -1)}


def _targets(rows: Rows) -> dict[str, Any]:
    """One list for each example."""
    return {name: array[:, 0] for name, array in _lists(rows).items()}


def _excluded(rows: Rows) -> dict[str, Any]:
    return {"excluded_labels": rows.labels}


# Losses of rows with a label each, by the number of the label and of the others.
_label = functools.partial(answers.by_label, label_losses.label_loss)
_spherical = functools.partial(answers.by_label, spherical.spherical_loss)

FAMILIES: dict[str, list[Function]] = {
    "probability of the label": [
        Function(
            "softmax_focal_loss",
            _label(label_losses.focal),
            _labels,
            parameters={"gamma": 1.5, "class_weights": WEIGHTS},
        ),
        Function(
            "comp_sum_loss",
            _label(label_losses.comp_sum),
            _labels,
            parameters={"tau": 0.25},
        ),
        Function(
            "generalized_cross_entropy_loss",
            _label(label_losses.generalized),
            _labels,
            parameters={"q": 0.7},
        ),
        Function("mean_absolute_error_loss", _label(label_losses.absolute), _labels),
        Function(
            "poly1_cross_entropy",
            _label(label_losses.poly1),
            _labels,
            parameters={"epsilon": 0.5},
        ),
        Function(
            "symmetric_cross_entropy",
            _label(label_losses.symmetric),
            _labels,
            parameters={"alpha": 0.3, "beta": 0.7, "log_zero": -4.0},
        ),
        Function("token_log_probs", answers.metrics({"loss": "log_prob"}), _labels),
        Function("token_surprisals", answers.metrics(), _labels),
        Function("token_surprisals", answers.of_likeliest(answers.metrics())),
        Function("sequence_log_probs", answers.sequences, _labels),
        Function("sequence_nll", answers.sequence_nll, _labels),
        Function("greedy_nll", answers.of_likeliest(answers.sequence_nll)),
        Function(
            "labelled_rows",
            answers.metrics(logsumexp_penalty=0.1),
            _labels,
            finish=lambda rows: rows.finish(-rows.log_prob + 0.1 * rows.lse**2),
        ),
        Function(
            "softmax_cross_entropy",
            answers.of_targets(answers.one_label, logsumexp_penalty=0.1),
            _labels,
            {"logsumexp_penalty": 0.1},
            {"class_weights": WEIGHTS},
        ),
    ],
    "smoothed labels": [
        Function(
            "softmax_cross_entropy",
            answers.metrics(**answers.SMOOTHED),
            _labels,
            {**answers.SMOOTHED, "return_lse": True},
            finish=lambda found: {"loss": found[0], "lse": found[1]},
        ),
        Function(
            "token_metrics",
            answers.metrics(**answers.SMOOTHED),
            _labels,
            {**answers.SMOOTHED, "metrics": ("loss", "log_prob", "lse")},
        ),
    ],
    "sum": [
        Function(
            "softmax_cross_entropy_sum",
            answers.summed,
            _labels,
            answers.SMOOTHED,
            {"row_weights": PER_ROW},
        )
    ],
    "several labels": [
        Function(
            "multi_label_cross_entropy",
            answers.of_targets(answers.several_labels, logsumexp_penalty=0.1),
            _lists,
            {"logsumexp_penalty": 0.1},
            {"label_weights": PER_LABEL, "class_weights": WEIGHTS},
        ),
        Function(
            "decoupled_softmax_loss",
            answers.of_positives(extreme.decoupled),
            _positives,
            parameters={"weights": PER_LABEL},
        ),
    ],
    "one versus all": [
        Function(
            "one_versus_all_loss",
            answers.of_positives(extreme.one_versus_all),
            _positives,
        )
    ],
    "squares": [
        Function(
            "log_spherical_softmax_loss",
            _spherical(spherical.log_spherical),
            _labels,
            parameters={"epsilon": 0.01},
        ),
        Function("log_taylor_softmax_loss", _spherical(spherical.log_taylor), _labels),
        Function(
            "spherical_squared_error", _spherical(spherical.squared_error), _labels
        ),
    ],
    "deviations": [
        Function(
            "z_loss",
            _spherical(spherical.z),
            _labels,
            parameters={"a": 0.5, "b": 1.5, "epsilon": 0.01},
        )
    ],
    "distribution": [
        Function("entropy", answers.metrics({"loss": "entropy"}, labelled=False)),
        Function("logsumexp", answers.metrics({"loss": "lse"}, labelled=False)),
        Function("sequence_entropy", answers.sequence_entropy),
    ],
    "statistics": [
        Function(
            "row_statistics",
            answers.statistics,
            _labels,
            {"statistics": softlib.logits.RowStatistics._fields},
        ),
        Function("label_rank", answers.ranks, _labels),
        Function("top1_correct", answers.metrics({"loss": "correct"}), _labels),
        Function(
            "gather",
            answers.gathered,
            lambda rows: {"class_ids": np.where(rows.kept, rows.lists, 0)},
        ),
        Function("log_ratio_codes", answers.log_ratios, answers.codes_of),
    ],
    "forward": [
        Function("moments", answers.surprisals, options={"order": 4}),
        Function("top_k", answers.greatest, options={"k": 3}),
        Function("sample", answers.drawn, options={"key": answers.KEY}),
        Function("entropy_test", answers.entropy_test, _labels),
    ],
    "robust": [
        Function(
            "robust_softmax_cross_entropy",
            answers.robust,
            _labels,
            parameters={"temperature": PER_ROW, "rho": 0.4},
            heated=False,
        ),
    ],
    "distance": [
        Function(
            "sdm_loss",
            answers.sdm,
            lambda rows: {**_labels(rows), **answers.SDM},
            heated=False,
        ),
    ],
    "search": [
        Function(
            "optimal_temperature",
            answers.best_temperature,
            options=answers.RANGE,
            parameters={"rho": 0.4},
            heated=False,
        ),
    ],
    "sequences": [
        Function(
            "edit_invariant_sequence_loss",
            answers.edits,
            _targets,
            {"ngrams": answers.NGRAMS, "floor": answers.FLOOR},
            {"weights": np.array([0.6, 0.4])},
        ),
        Function("ctc_loss", answers.alignments, _targets),
    ],
    "soft top k": [
        Function(
            "soft_top_k_loss",
            answers.of_positives(extreme.soft_top_k, k=2.5, alpha=1.5),
            _positives,
            {"k": 2.5, "alpha": 1.5},
            {"weights": PER_LABEL},
        ),
    ],
    "soft labels": [
        Function(
            "softmax_cross_entropy",
            answers.of_targets(answers.distribution, **answers.SMOOTHED),
            lambda rows: {"labels": rows.distribution},
            answers.SMOOTHED,
            {"class_weights": WEIGHTS},
        ),
    ],
}

# Of two sources each. By the name of the function and of what distinguishes it.
PAIRS: dict[str, Function] = {
    "softmax_kl_divergence": Function(
        "softmax_kl_divergence", answers.divergence(divergences.kl), _excluded
    ),
    "softmax_kl_divergence reversed": Function(
        "softmax_kl_divergence",
        answers.divergence(divergences.kl, reverse=True),
        _excluded,
        {"reverse": True},
    ),
    "softmax_jensen_shannon_divergence": Function(
        "softmax_jensen_shannon_divergence",
        answers.divergence(divergences.jensen_shannon),
        _excluded,
        parameters={"mixture": 0.3},
    ),
    "softmax_soft_target_cross_entropy": Function(
        "softmax_soft_target_cross_entropy",
        answers.divergence(divergences.cross_entropy),
    ),
    "two_model_test": Function("two_model_test", answers.two_models, _labels),
    "kl_to_reference": Function("kl_to_reference", answers.mean_divergence),
    "knowledge_distillation_loss": Function(
        "knowledge_distillation_loss",
        answers.of_matrices(answers.plain_distillation, labelled=False),
        parameters={"temperature": 1.7},
        heated=False,
    ),
    "normalized_distillation_loss": Function(
        "normalized_distillation_loss",
        answers.of_matrices(
            divergences.normalized_distillation, answers.normalized_without_label
        ),
        _labels,
        parameters={"temperature": 1.7, "gamma": 1.2},
        heated=False,
    ),
    "decoupled_knowledge_distillation_loss": Function(
        "decoupled_knowledge_distillation_loss",
        answers.of_matrices(
            divergences.decoupled_distillation, answers.decoupled_without_label
        ),
        _labels,
        parameters={"alpha": 0.7, "beta": 6.0, "temperature": 2.5},
        heated=False,
    ),
    "smooth_adversarial_comp_sum_loss": Function(
        "smooth_adversarial_comp_sum_loss",
        answers.of_matrices(
            label_losses.smooth_adversarial,
            lambda z, moved, **parameters: np.inf,
            constant=False,
        ),
        _labels,
        parameters={"tau": 0.25, "rho": 0.8, "nu": 1.5},
        heated=False,
    ),
}
