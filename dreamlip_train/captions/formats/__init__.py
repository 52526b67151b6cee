"""The files that captions come in: the layouts that people publish, and their rows in our columns."""
