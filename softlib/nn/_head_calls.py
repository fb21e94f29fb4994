"""What both output heads do once their parameters are arrays."""

from typing import Any

from flax.typing import Dtype
from jaxtyping import Array

from softlib import losses
from softlib.logits import TokenMetrics


def operands(
    hidden: Array,
    table: Array,
    bias: Array | None,
    logit_scale: float | None,
    logit_softcap: float | None,
    dtype: Dtype | None,
) -> tuple[Array, Array, dict[str, Any]]:
    """Hidden, weight and the head's own options, in the dtype of the products."""
    if dtype is not None:
        hidden, table = hidden.astype(dtype), table.astype(dtype)
    own = {"bias": bias, "logit_scale": logit_scale, "logit_softcap": logit_softcap}
    return hidden, table, own


def loss_or_logits(
    hidden: Array,
    weight: Array,
    own: dict[str, Any],
    labels: Array | None,
    **options: Any,
) -> Any:
    if labels is None:
        return losses.linear_logits(hidden, weight, **own, **options)
    loss = losses.linear_softmax_cross_entropy
    return loss(hidden, weight, labels, **own, **options)


def token_metrics(
    hidden: Array, weight: Array, own: dict[str, Any], labels: Array, **options: Any
) -> TokenMetrics:
    return losses.linear_token_metrics(hidden, weight, labels, **own, **options)
