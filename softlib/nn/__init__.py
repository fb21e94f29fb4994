"""Flax modules; each owns parameters and calls public functions of softlib.

- `OutputHead` (NNX), `LinenOutputHead` (linen): the output layer of a language model.
- `attention_fn`: masks of softlib in the attention layers of NNX and linen.
- `TensorAttention` (NNX): multi-head attention over tuples of keys.
- `MixtureOfExperts`, `RouterReport`, `SelectionBias` (NNX): experts behind a router;
  `capacity_dispatch`, `capacity_experts`, `dropless_experts`, `ExpertRows`: its parts.
- `TempNet`, `PrototypeTempNet` (NNX): a softmax temperature per row.
- `VideoTransformerBlock`, `VideoPositions` (NNX): radial attention over videos.
- `LinearAttention`, `NormalizedAttention`, `GatedLinearAttention`, `SelectiveScan`,
  `QuasiLSTM` (NNX): linear systems with varying parameters.
"""

from ._attention import attention_fn as attention_fn
from ._expert_dispatch import (
    ExpertRows as ExpertRows,
    capacity_dispatch as capacity_dispatch,
    capacity_experts as capacity_experts,
    dropless_experts as dropless_experts,
)
from ._linen_output_head import LinenOutputHead as LinenOutputHead
from ._mixture_of_experts import (
    MixtureOfExperts as MixtureOfExperts,
    RouterReport as RouterReport,
    SelectionBias as SelectionBias,
)
from ._output_head import OutputHead as OutputHead
from ._recurrent import (
    GatedLinearAttention as GatedLinearAttention,
    LinearAttention as LinearAttention,
    NormalizedAttention as NormalizedAttention,
    QuasiLSTM as QuasiLSTM,
    SelectiveScan as SelectiveScan,
)
from ._temperature_network import (
    PrototypeTempNet as PrototypeTempNet,
    TempNet as TempNet,
)
from ._tensor_attention import TensorAttention as TensorAttention
from ._video import (
    VideoPositions as VideoPositions,
    VideoTransformerBlock as VideoTransformerBlock,
)

__all__ = [
    "ExpertRows",
    "GatedLinearAttention",
    "LinearAttention",
    "LinenOutputHead",
    "MixtureOfExperts",
    "NormalizedAttention",
    "OutputHead",
    "PrototypeTempNet",
    "QuasiLSTM",
    "RouterReport",
    "SelectionBias",
    "SelectiveScan",
    "TempNet",
    "TensorAttention",
    "VideoPositions",
    "VideoTransformerBlock",
    "attention_fn",
    "capacity_dispatch",
    "capacity_experts",
    "dropless_experts",
]
