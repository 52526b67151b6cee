"""What an executed kernel may do wrong, each by its name; the message says which instruction of which line, and which
thread of which block.
"""


class PtxError(Exception):
    """The base of all of them."""


class UnknownInstruction(PtxError):
    """The executor does not know this instruction, or this form of it."""


class BadOperand(PtxError):
    """Operands that the instruction cannot have: wrong number, unknown name, a descriptor with reserved or misaligned
    fields.
    """


class WrongParameters(PtxError):
    """A launch with more or fewer arguments than the kernel has parameters, or of another size."""


class OutOfBounds(PtxError):
    """A load or store outside the tensors of the launch, or outside the block's shared memory."""


class Misaligned(PtxError):
    """An address that is no multiple of the size of the access."""


class Deadlock(PtxError):
    """Threads wait for something that no thread will do."""


class Divergence(PtxError):
    """Threads of one warp at different places where the instruction wants all of them."""


class AsyncHazard(PtxError):
    """Data of an asynchronous operation touched before its wait."""
