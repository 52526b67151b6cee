"""Tar shards in, batches out: who reads what, decoding, and a count of what could not be used.

Bad data is counted and named, never silent.
"""
