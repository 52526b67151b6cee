"""Triton kernels of group_patches: weights of patches (scores), what they pool (forward), the gradients (backward)."""
