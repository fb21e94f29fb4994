"""Few queries against a long cache: the stream, its kernels, its calibration."""
