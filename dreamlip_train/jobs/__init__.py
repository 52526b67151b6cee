"""How long work is shared out and finished once: processes, a cluster, claims, folders and files that appear whole.

Knows nothing of images, captions or models.
"""
