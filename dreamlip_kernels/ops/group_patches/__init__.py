"""Pooling the patches that each sub-caption is about: the op and its backends."""
