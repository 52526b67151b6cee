"""The registered ops and their backends: tensors in, tensors out, on one process.

Knows nothing of process groups or losses.
"""
