"""Tar shards: their names as users write them, what they hold, how they are read and how they are written."""
