"""Fits of small models, each with a number that says how good it is.

- `fit_softmax_regression`: a softmax of linear scores, by damped Gauss-Newton; its
  `softmax_regression_loss` with gradient, Hessian and Hessian-vector product, and
  `in_context_label_shift`, a change of weights or data told as a change of labels.
- `fit_gaussian_experts`: Gaussian mixtures of linear experts (`GaussianExperts`) with
  the gates of `ExpertGate`, by EM or Newton from the starts of `draw_gaussian_experts`;
  log-density, log-gate, responsibilities and M-step.
- `gaussian_experts_hellinger_distance`, `voronoi_loss`, `voronoi_cells`,
  `gauge_fixed_experts`: how far an estimate is from the truth.
- `comp_sum_regret_bound`: what the regret of `softlib.losses.comp_sum_loss` guarantees
  about the error of a classifier; `comp_sum_transformation`, its inverse.
"""

from ._comp_sum_bounds import (
    comp_sum_regret_bound as comp_sum_regret_bound,
    comp_sum_transformation as comp_sum_transformation,
)
from ._fit_gaussian_experts import (
    GaussianExpertsFit as GaussianExpertsFit,
    draw_gaussian_experts as draw_gaussian_experts,
    fit_gaussian_experts as fit_gaussian_experts,
)
from ._gaussian_experts import (
    ExpertGate as ExpertGate,
    GaussianExperts as GaussianExperts,
    gaussian_experts_hellinger_distance as gaussian_experts_hellinger_distance,
    gaussian_experts_log_density as gaussian_experts_log_density,
    gaussian_experts_log_gate as gaussian_experts_log_gate,
    gaussian_experts_m_step as gaussian_experts_m_step,
    gaussian_experts_responsibilities as gaussian_experts_responsibilities,
)
from ._softmax_regression import (
    LabelShift as LabelShift,
    SoftmaxRegressionFit as SoftmaxRegressionFit,
    fit_softmax_regression as fit_softmax_regression,
    in_context_label_shift as in_context_label_shift,
    softmax_regression_gradient as softmax_regression_gradient,
    softmax_regression_hessian as softmax_regression_hessian,
    softmax_regression_hessian_vector_product as softmax_regression_hessian_vector_product,  # noqa: E501
    softmax_regression_loss as softmax_regression_loss,
)
from ._voronoi import (
    gauge_fixed_experts as gauge_fixed_experts,
    voronoi_cells as voronoi_cells,
    voronoi_loss as voronoi_loss,
)

__all__ = [
    "ExpertGate",
    "GaussianExperts",
    "GaussianExpertsFit",
    "LabelShift",
    "SoftmaxRegressionFit",
    "comp_sum_regret_bound",
    "comp_sum_transformation",
    "draw_gaussian_experts",
    "fit_gaussian_experts",
    "fit_softmax_regression",
    "gauge_fixed_experts",
    "gaussian_experts_hellinger_distance",
    "gaussian_experts_log_density",
    "gaussian_experts_log_gate",
    "gaussian_experts_m_step",
    "gaussian_experts_responsibilities",
    "in_context_label_shift",
    "softmax_regression_gradient",
    "softmax_regression_hessian",
    "softmax_regression_hessian_vector_product",
    "softmax_regression_loss",
    "voronoi_cells",
    "voronoi_loss",
]
