"""Logits as values, formed or not, and numbers per row computed from them.

- `LinearLogits`: logits of a linear head, never formed; `StoredLogits`: an array with
  bias, scale, softcap and temperature; `AbstractLogits`: their base; `Logits`: the type
  that losses accept, one of these or an array.
- `VQLogits`: logits of a codebook; `LoRALogits`: of a linear head with a low-rank
  change; `QuantizedLogits`: of one whose weight is held in few bits; `FusedLogits`: a
  linear combination of several models' logits;
  `BlockwiseLogits`: the base of user-defined heads.
- `row_statistics`, `RowStatistics`: statistics from one stream over the vocabulary.
- `logsumexp`, `entropy`, `moments`: numbers of each row.
- `token_log_probs`, `token_surprisals`, `top1_correct`, `label_rank`: numbers of each
  label;
  `token_metrics`, `TokenMetrics`: several of them from one pass;
  `sequence_log_probs`: their sum over tokens.
- `labelled_rows`, `LabelledRows`: rows for a user-defined loss.
- `top_k`, `TopK`: the best classes of each row; `sample`: one drawn class;
  `gather`: the logits at given classes.
- `optimal_temperature`: the temperature that minimises the robust loss.
"""

from ._blockwise import BlockwiseLogits as BlockwiseLogits
from ._compose import TokenMetrics as TokenMetrics
from ._engine.tile import RowStatistics as RowStatistics
from ._fused import FusedLogits as FusedLogits
from ._gather import gather as gather
from ._label_rank import label_rank as label_rank
from ._linear import LinearLogits as LinearLogits
from ._lora import LoRALogits as LoRALogits
from ._moments import Moments as Moments, moments as moments
from ._optimal_temperature import optimal_temperature as optimal_temperature
from ._quantized import QuantizedLogits as QuantizedLogits
from ._row_statistics import (
    entropy as entropy,
    logsumexp as logsumexp,
    row_statistics as row_statistics,
)
from ._rows import LabelledRows as LabelledRows, labelled_rows as labelled_rows
from ._sample import sample as sample
from ._sequence import sequence_log_probs as sequence_log_probs
from ._sources import Logits as Logits
from ._stored import StoredLogits as StoredLogits
from ._tokens import (
    token_log_probs as token_log_probs,
    token_metrics as token_metrics,
    token_surprisals as token_surprisals,
    top1_correct as top1_correct,
)
from ._top_k import TopK as TopK, top_k as top_k
from ._value import AbstractLogits as AbstractLogits
from ._vq import VQLogits as VQLogits

__all__ = [
    "AbstractLogits",
    "BlockwiseLogits",
    "FusedLogits",
    "LabelledRows",
    "LinearLogits",
    "LoRALogits",
    "Logits",
    "Moments",
    "QuantizedLogits",
    "RowStatistics",
    "StoredLogits",
    "TokenMetrics",
    "TopK",
    "VQLogits",
    "entropy",
    "gather",
    "label_rank",
    "labelled_rows",
    "logsumexp",
    "moments",
    "optimal_temperature",
    "row_statistics",
    "sample",
    "sequence_log_probs",
    "token_log_probs",
    "token_metrics",
    "token_surprisals",
    "top1_correct",
    "top_k",
]
