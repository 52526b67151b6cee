"""Captions as text: sentences, columns, tables and counts.

Knows nothing of shards, images or models.
"""
