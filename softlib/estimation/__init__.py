"""Fits of small models, each with a number that says how good it is.

- `SoftmaxRegression`: a softmax of linear scores and the distance to a vector, with
  gradient, Hessian and Hessian-vector product; `fit_softmax_regression` by damped
  Gauss-Newton; `in_context_label_shift`, a change of weights or data told as one of
  labels.
- `GaussianExperts`: Gaussian mixtures of linear experts with the gates of `ExpertGate`,
  their log-density, responsibilities, M-step and Hellinger distance;
  `fit_gaussian_experts` by EM or Newton from the starts of `draw_gaussian_experts`.
- `voronoi_loss`, `voronoi_cells`, `gauge_fixed_experts`: how far an estimate is from
  the truth.
- `annealing_areas` of a schedule of learning rates; `AnnealingLaw`, the loss of
  training as a function of them; `fit_annealing_law`.
- `fit_exponential_family` by Newton; `projection_risk`, how far such a fit is from the
  information projection of whatever is true, `second_order_projection_risk` of one
  parameter, from `log_partition_cumulants`; `pn_criterion`, whether that is near enough
  by the `bayes_error_lower_bound`.
- `fit_separator`: a halfspace by logistic regression with any step size, the perceptron
  among them; `separation_step_bound`, the steps that it takes at most.
- `fit_sdm_calibration` of outputs of `softlib.softmax.sdm`; `sdm_estimate`, with lower
  bounds, and which predictions reach a level of confidence.
- `fit_halfspace`: a halfspace from noisy signs, by descent on the sphere;
  `halfspace_tester`, whether the sample looks as the guarantee needs it, from
  `strip_statistics`, `gaussian_moment_deviations` and `halfspace_disagreement`.
- `comp_sum_regret_bound`: what the regret of `softlib.losses.comp_sum_loss` guarantees
  about the error of a classifier; `comp_sum_transformation`, its inverse.
- `log_graph_proximity`: logarithms of how near the nodes of a graph are, over all
  paths; `proximity_distance`, a metric for clustering.
- `HadamardSketch`, `GaussianSketch`, `CountSketch`, `TensorHadamardSketch`: random
  linear maps to few rows; `fwht`, the transform of the first; `sketched_lstsq`, least
  squares through them with a bound on every coordinate's error.
- `fit_factor_model`, `factor_features`: probabilistic principal components of data
  without labels, as features for few labels; `fit_gaussian_mixture`,
  `gaussian_mixture_step`, `gaussian_mixture_log_joint` of a `GaussianMixture`, by EM.
- `naive_bayes_update`, `naive_bayes_merge` of a `NaiveBayesState`: Gaussian naive
  Bayes, streamed; `naive_bayes_head`, a `LinearHead`, and `naive_bayes_logits` from it;
  `fit_logistic_regression`, the head that minimises cross-entropy, by Newton.
- `fit_log_linear`, `fit_power_law`: scaling laws, lines through logarithms, with
  intervals of their numbers.
"""

from ._annealing_law import (
    AnnealingAreas as AnnealingAreas,
    AnnealingLaw as AnnealingLaw,
    AnnealingLawFit as AnnealingLawFit,
    annealing_areas as annealing_areas,
    fit_annealing_law as fit_annealing_law,
)
from ._comp_sum_bounds import (
    comp_sum_regret_bound as comp_sum_regret_bound,
    comp_sum_transformation as comp_sum_transformation,
)
from ._factor_model import (
    FactorModel as FactorModel,
    factor_features as factor_features,
    fit_factor_model as fit_factor_model,
)
from ._fit_gaussian_experts import (
    GaussianExpertsFit as GaussianExpertsFit,
    draw_gaussian_experts as draw_gaussian_experts,
    fit_gaussian_experts as fit_gaussian_experts,
)
from ._gaussian_experts import (
    ExpertGate as ExpertGate,
    GaussianExperts as GaussianExperts,
)
from ._gaussian_mixture import (
    GaussianMixture as GaussianMixture,
    GaussianMixtureFit as GaussianMixtureFit,
    GaussianMixtureStep as GaussianMixtureStep,
    fit_gaussian_mixture as fit_gaussian_mixture,
    gaussian_mixture_log_joint as gaussian_mixture_log_joint,
    gaussian_mixture_step as gaussian_mixture_step,
)
from ._graph_proximity import (
    ProximityDistance as ProximityDistance,
    log_graph_proximity as log_graph_proximity,
    proximity_distance as proximity_distance,
)
from ._halfspace import (
    HalfspaceDisagreement as HalfspaceDisagreement,
    HalfspaceFit as HalfspaceFit,
    HalfspaceTest as HalfspaceTest,
    StripStatistics as StripStatistics,
    fit_halfspace as fit_halfspace,
    gaussian_moment_deviations as gaussian_moment_deviations,
    halfspace_disagreement as halfspace_disagreement,
    halfspace_tester as halfspace_tester,
    strip_statistics as strip_statistics,
)
from ._information_projection import (
    ExponentialFamilyFit as ExponentialFamilyFit,
    bayes_error_lower_bound as bayes_error_lower_bound,
    fit_exponential_family as fit_exponential_family,
    log_partition_cumulants as log_partition_cumulants,
    pn_criterion as pn_criterion,
    projection_risk as projection_risk,
    second_order_projection_risk as second_order_projection_risk,
)
from ._logistic_regression import (
    LogisticRegressionFit as LogisticRegressionFit,
    fit_logistic_regression as fit_logistic_regression,
)
from ._naive_bayes import (
    LinearHead as LinearHead,
    NaiveBayesState as NaiveBayesState,
    naive_bayes_head as naive_bayes_head,
    naive_bayes_logits as naive_bayes_logits,
    naive_bayes_merge as naive_bayes_merge,
    naive_bayes_update as naive_bayes_update,
)
from ._scaling_laws import (
    LogLinearFit as LogLinearFit,
    PowerLawFit as PowerLawFit,
    fit_log_linear as fit_log_linear,
    fit_power_law as fit_power_law,
)
from ._sdm_calibration import (
    SDMCalibration as SDMCalibration,
    SDMEstimate as SDMEstimate,
    fit_sdm_calibration as fit_sdm_calibration,
    sdm_estimate as sdm_estimate,
)
from ._separator import (
    SeparatorFit as SeparatorFit,
    fit_separator as fit_separator,
    separation_step_bound as separation_step_bound,
)
from ._sketched_lstsq import (
    SketchedLeastSquares as SketchedLeastSquares,
    sketched_lstsq as sketched_lstsq,
)
from ._sketches import (
    CountSketch as CountSketch,
    GaussianSketch as GaussianSketch,
    HadamardSketch as HadamardSketch,
    TensorHadamardSketch as TensorHadamardSketch,
    fwht as fwht,
)
from ._softmax_regression import (
    LabelShift as LabelShift,
    SoftmaxRegression as SoftmaxRegression,
    SoftmaxRegressionFit as SoftmaxRegressionFit,
    fit_softmax_regression as fit_softmax_regression,
    in_context_label_shift as in_context_label_shift,
)
from ._voronoi import (
    gauge_fixed_experts as gauge_fixed_experts,
    voronoi_cells as voronoi_cells,
    voronoi_loss as voronoi_loss,
)

__all__ = [
    "AnnealingAreas",
    "AnnealingLaw",
    "AnnealingLawFit",
    "CountSketch",
    "ExpertGate",
    "ExponentialFamilyFit",
    "FactorModel",
    "GaussianExperts",
    "GaussianExpertsFit",
    "GaussianMixture",
    "GaussianMixtureFit",
    "GaussianMixtureStep",
    "GaussianSketch",
    "HadamardSketch",
    "HalfspaceDisagreement",
    "HalfspaceFit",
    "HalfspaceTest",
    "LabelShift",
    "LinearHead",
    "LogLinearFit",
    "LogisticRegressionFit",
    "NaiveBayesState",
    "PowerLawFit",
    "ProximityDistance",
    "SDMCalibration",
    "SDMEstimate",
    "SeparatorFit",
    "SketchedLeastSquares",
    "SoftmaxRegression",
    "SoftmaxRegressionFit",
    "StripStatistics",
    "TensorHadamardSketch",
    "annealing_areas",
    "bayes_error_lower_bound",
    "comp_sum_regret_bound",
    "comp_sum_transformation",
    "draw_gaussian_experts",
    "factor_features",
    "fit_annealing_law",
    "fit_exponential_family",
    "fit_factor_model",
    "fit_gaussian_experts",
    "fit_gaussian_mixture",
    "fit_halfspace",
    "fit_log_linear",
    "fit_logistic_regression",
    "fit_power_law",
    "fit_sdm_calibration",
    "fit_separator",
    "fit_softmax_regression",
    "fwht",
    "gauge_fixed_experts",
    "gaussian_mixture_log_joint",
    "gaussian_mixture_step",
    "gaussian_moment_deviations",
    "halfspace_disagreement",
    "halfspace_tester",
    "in_context_label_shift",
    "log_graph_proximity",
    "log_partition_cumulants",
    "naive_bayes_head",
    "naive_bayes_logits",
    "naive_bayes_merge",
    "naive_bayes_update",
    "pn_criterion",
    "projection_risk",
    "proximity_distance",
    "sdm_estimate",
    "second_order_projection_risk",
    "separation_step_bound",
    "sketched_lstsq",
    "strip_statistics",
    "voronoi_cells",
    "voronoi_loss",
]
