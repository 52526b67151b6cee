"""Scores of a model: retrieval, localization, zero-shot, multi-label and segmentation, with the paper's numbers
beside.
"""
