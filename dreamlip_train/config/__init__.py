"""Every setting of a run once, as a documented dataclass field; TOML in and out; the named recipes.

Imports nothing of the other packages and no heavy dependency.
"""
