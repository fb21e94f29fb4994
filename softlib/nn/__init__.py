"""Flax modules; each owns parameters and calls public functions of softlib.

- `OutputHead` (NNX), `LinenOutputHead` (linen): the output layer of a language model.
- `VQLogitsHead` (NNX), `CodebookVariable`: a head whose tokens share codes, with
  `vq_sample`, `vq_clusters`, `TokenClusters`; its codes come from
  `frequency_mapping`, `straight_through_codes`, `codebook_ema_update`,
  `codebook_state`, `CodebookState`, and from `softlib.quantize.kmeans`.
- `FourierHead` (NNX): a head over bins of a number, and `FourierDensity`, the value
  that it makes, which needs no bins.
- `attention_fn`: masks of softlib in the attention layers of NNX and linen.
- `TensorAttention` (NNX): multi-head attention over tuples of keys.
- `MixtureOfExperts`, `MixtureResult`, `RouterReport`, `SelectionBias` (NNX): experts
  behind a router; `capacity_dispatch`, `capacity_experts`, `dropless_experts`,
  `ExpertRows`: its parts.
- `TempNet`, `PrototypeTempNet` (NNX): a softmax temperature per row.
- `prepend_soft_prompt`: trained vectors in front of a sequence.
- `gcn_propagate`, `gcn_propagate_edges`: graph convolution.
- `generalized_gaussian_init`: initial kernels with other tails than normal ones.
- `VideoTransformerBlock`, `VideoPositions` (NNX): radial attention over videos.
- `LinearAttention`, `NormalizedAttention`, `GatedLinearAttention`, `SelectiveScan`,
  `QuasiLSTM` (NNX): linear systems with varying parameters.
"""

from ._attention import attention_fn as attention_fn
from ._codebook import (
    CodebookState as CodebookState,
    codebook_ema_update as codebook_ema_update,
    codebook_state as codebook_state,
    frequency_mapping as frequency_mapping,
    straight_through_codes as straight_through_codes,
)
from ._expert_dispatch import (
    ExpertRows as ExpertRows,
    capacity_dispatch as capacity_dispatch,
    capacity_experts as capacity_experts,
    dropless_experts as dropless_experts,
)
from ._fourier_density import FourierDensity as FourierDensity
from ._fourier_head import FourierHead as FourierHead
from ._graph_convolution import (
    gcn_propagate as gcn_propagate,
    gcn_propagate_edges as gcn_propagate_edges,
)
from ._initializers import generalized_gaussian_init as generalized_gaussian_init
from ._linen_output_head import LinenOutputHead as LinenOutputHead
from ._mixture_of_experts import (
    MixtureOfExperts as MixtureOfExperts,
    MixtureResult as MixtureResult,
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
from ._soft_prompt import prepend_soft_prompt as prepend_soft_prompt
from ._temperature_network import (
    PrototypeTempNet as PrototypeTempNet,
    TempNet as TempNet,
)
from ._tensor_attention import TensorAttention as TensorAttention
from ._video import (
    VideoPositions as VideoPositions,
    VideoTransformerBlock as VideoTransformerBlock,
)
from ._vq_head import (
    CodebookVariable as CodebookVariable,
    VQLogitsHead as VQLogitsHead,
)
from ._vq_logits import (
    TokenClusters as TokenClusters,
    vq_clusters as vq_clusters,
    vq_sample as vq_sample,
)

__all__ = [
    "CodebookState",
    "CodebookVariable",
    "ExpertRows",
    "FourierDensity",
    "FourierHead",
    "GatedLinearAttention",
    "LinearAttention",
    "LinenOutputHead",
    "MixtureOfExperts",
    "MixtureResult",
    "NormalizedAttention",
    "OutputHead",
    "PrototypeTempNet",
    "QuasiLSTM",
    "RouterReport",
    "SelectionBias",
    "SelectiveScan",
    "TempNet",
    "TensorAttention",
    "TokenClusters",
    "VQLogitsHead",
    "VideoPositions",
    "VideoTransformerBlock",
    "attention_fn",
    "capacity_dispatch",
    "capacity_experts",
    "codebook_ema_update",
    "codebook_state",
    "dropless_experts",
    "frequency_mapping",
    "gcn_propagate",
    "gcn_propagate_edges",
    "generalized_gaussian_init",
    "prepend_soft_prompt",
    "straight_through_codes",
    "vq_clusters",
    "vq_sample",
]
