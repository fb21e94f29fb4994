"""Numbers about distributions: divergences, mutual information, and what they bound.

- `conditional_mutual_information` of inputs and predictions given the class, and the
  centroids it needs: `class_centroids`, `class_centroid_sums`, `CentroidSums`,
  `centroid_update`
"""

from ._conditional import (
    CentroidSums as CentroidSums,
    centroid_update as centroid_update,
    class_centroid_sums as class_centroid_sums,
    class_centroids as class_centroids,
    conditional_mutual_information as conditional_mutual_information,
)

__all__ = [
    "CentroidSums",
    "centroid_update",
    "class_centroid_sums",
    "class_centroids",
    "conditional_mutual_information",
]
