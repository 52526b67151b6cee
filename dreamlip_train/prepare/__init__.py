"""Shards made and checked before training: from folders, joined with captions, recaptioned, validated, or painted."""
