"""Sources as PTX: Triton kernels by a process that is kept for the session, csrc's by nvcc."""
