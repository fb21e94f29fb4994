"""Softmax variants, attention masks and large-vocabulary losses for JAX.

- `softlib.logits`: what one asks of logits, formed or not.
- `softlib.losses`: losses over vocabularies too large to form the logits.
- `softlib.softmax`: softmax and its relatives, maps from scores to probabilities.
- `softlib.attention`: attention that costs what its mask leaves.
- `softlib.recurrent`: linear systems with varying parameters, in linear time.
- `softlib.masks`: attention masks, values that compose.
- `softlib.quantize`: weights in few bits.
- `softlib.numerics`: the streaming accumulators they are built on.
- `softlib.estimation`: small models, fitted with a stated guarantee.
- `softlib.decoding`: drawing sequences from models.
- `softlib.scoring`: judging given text by its log-probabilities.
- `softlib.metrics`: measures of predictions and of training.
- `softlib.mining`: batches whose labels are hard negatives of each other.
- `softlib.information`: numbers about distributions.
- `softlib.bandits`: bandits whose arms pass once (loaded on first use).
- `softlib.logs`: logs of programs, as columns (loaded on first use).
- `softlib.optim`: optimisation (loaded on first use, with optax).
- `softlib.nn`: Flax modules (loaded on first use, with flax).
- `softlib.testing`: comparisons and the transformation battery (loaded on first use).
- `softlib.LinearLogits`: the logits of a linear head, a value that losses take and that
  is never formed; `softlib.Logits`: what losses accept, that or an array.
- `softlib.masked_mean`: the one reduction.
- `softlib.explain`: which implementation a call would use on which platform, and why;
  an `Explanation` of `ExplainedOperation`s.
- `softlib.implementations`: keeps a whole program off kernels, or on them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import (
    attention as attention,
    information as information,
    logits as logits,
    losses as losses,
    masks as masks,
    numerics as numerics,
    quantize as quantize,
    recurrent as recurrent,
    softmax as softmax,
    typing as typing,
)
from ._dispatch import explain as explain
from ._explanation import (
    ExplainedOperation as ExplainedOperation,
    Explanation as Explanation,
)
from ._masked_mean import masked_mean as masked_mean
from ._preferred import implementations as implementations
from .logits import LinearLogits as LinearLogits, Logits as Logits

__version__ = "0.1.0"
__all__ = [
    "ExplainedOperation",
    "Explanation",
    "LinearLogits",
    "Logits",
    "attention",
    "bandits",
    "decoding",
    "estimation",
    "explain",
    "implementations",
    "information",
    "logits",
    "logs",
    "losses",
    "masked_mean",
    "masks",
    "metrics",
    "mining",
    "nn",
    "numerics",
    "optim",
    "quantize",
    "recurrent",
    "scoring",
    "softmax",
    "testing",
    "typing",
]

# Loaded on first use, so that `import softlib` is quick and needs neither flax nor a
# test library. The imports below are for type checkers.
_LAZY = (
    "bandits",
    "decoding",
    "estimation",
    "logs",
    "metrics",
    "mining",
    "nn",
    "optim",
    "scoring",
    "testing",
)

if TYPE_CHECKING:
    from . import (
        bandits as bandits,
        decoding as decoding,
        estimation as estimation,
        logs as logs,
        metrics as metrics,
        mining as mining,
        nn as nn,
        optim as optim,
        scoring as scoring,
        testing as testing,
    )


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
