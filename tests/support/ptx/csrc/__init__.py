"""csrc's CUDA kernels executed, launched as csrc's own launchers plan it."""
