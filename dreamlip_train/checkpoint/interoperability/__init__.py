"""A model to and from other libraries: open_clip, transformers, and archives of foreign weights, each verified."""
