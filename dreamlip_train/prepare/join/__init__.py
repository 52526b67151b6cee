"""Captions of tables given to images of shards: by key, by URL or by name, row by row, no sample lost unseen."""
