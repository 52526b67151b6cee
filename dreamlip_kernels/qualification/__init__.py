"""Which backends are right and faster on a device: measured there, once, in processes of their own, and kept on disk.

``qualify`` is the way in; ``dreamlip_kernels.backends.verdicts`` holds what it found, and "auto" reads that.
"""

from .measure import qualify

__all__ = ["qualify"]
