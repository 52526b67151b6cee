"""The functions that execute instructions, a family a file. Importing a family registers what it executes, so that
whoever imports this package has all of them.
"""

from . import arithmetic, copies, exchange, movement, tensor_copies, tensor_core, warp_group

__all__ = ["arithmetic", "copies", "exchange", "movement", "tensor_copies", "tensor_core", "warp_group"]
