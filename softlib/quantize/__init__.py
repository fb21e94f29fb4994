"""Weights in few bits: by groups, by vectors of a codebook, pruned, as small floats.

- `QuantizedArray`: codes, scales, zeros and a codebook; the type that heads accept
  (`softlib.logits.QuantizedLogits`), decoded whole or slice by slice.
- `quantize_groups`: rounds groups of weights to two to eight bits.
- `quantize_vectors`: short vectors of weights by the nearest of a codebook, which
  `fit_codebook` finds.
- `kmeans`, `KMeans`, `assign_codes`: centroids of rows, and the nearest one.
- `prune_by_magnitude`, `Pruned`: the largest weights, and where they are.
- `pack_codes`, `unpack_codes`: integers of few bits in words of 32.
- `FloatFormat`: floats of at most eight bits, of any layout.
"""

from ._float_format import FloatFormat as FloatFormat
from ._groups import quantize_groups as quantize_groups
from ._kmeans import (
    KMeans as KMeans,
    assign_codes as assign_codes,
    kmeans as kmeans,
)
from ._packing import pack_codes as pack_codes, unpack_codes as unpack_codes
from ._pruning import Pruned as Pruned, prune_by_magnitude as prune_by_magnitude
from ._quantized_array import (
    QuantizedArray as QuantizedArray,
    QuantizedParameters as QuantizedParameters,
)
from ._vectors import (
    fit_codebook as fit_codebook,
    quantize_vectors as quantize_vectors,
)

__all__ = [
    "FloatFormat",
    "KMeans",
    "Pruned",
    "QuantizedArray",
    "QuantizedParameters",
    "assign_codes",
    "fit_codebook",
    "kmeans",
    "pack_codes",
    "prune_by_magnitude",
    "quantize_groups",
    "quantize_vectors",
    "unpack_codes",
]
