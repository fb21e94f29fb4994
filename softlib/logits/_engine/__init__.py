"""Row statistics of logits, tile by tile: streams, kernels, derivative rules."""
