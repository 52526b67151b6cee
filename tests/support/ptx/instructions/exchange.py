"""What the threads of a warp do together (PTX ISA sections 9.7.9.6, "shfl.sync", 9.7.13, votes, reductions and
elections).
"""

from __future__ import annotations

import numpy as np

from ..machine.errors import Divergence
from ..machine.program import Both
from ..machine.table import executes
from ..machine.wave import WARP
from .arithmetic import count


def _members(threads, mask) -> None:
    """All threads of the mask must be here: whoever waits for one that is elsewhere would wait for ever."""
    present = np.zeros(threads.wave.lanes, np.uint32)
    present[threads.lanes] = np.uint32(1) << (threads.lanes % WARP).astype(np.uint32)
    here = np.bitwise_or.reduce(present.reshape(-1, WARP), 1)[threads.lanes // WARP]
    if (threads.each(mask, "u32") & ~here).any():
        raise Divergence("threads of the instruction's mask are elsewhere")


@executes("shfl", r"\.sync\.(?P<mode>idx|bfly|up|down)\.b32")
def shuffle(threads, operands, form, name):
    """9.7.9.6: d = a of the lane that mode, b and the clamp and segment of c name, or the own a where that lane is
    outside the segment.
    """
    count(operands, 5)
    target, source, b, c, mask = operands
    _members(threads, mask)
    lane = (threads.lanes % WARP).astype(np.int64)
    b, c = (threads.each(operand, "u32").astype(np.int64) for operand in (b, c))
    segment, clamp, offset = c >> 8 & 31, c & 31, b & 31
    most = (lane & segment) | (clamp & ~segment)
    least = lane & segment
    source_lane, inside = {
        "up": lambda: (lane - offset, lane - offset >= most),
        "down": lambda: (lane + offset, lane + offset <= most),
        "bfly": lambda: (lane ^ offset, (lane ^ offset) <= most),
        "idx": lambda: (least | (offset & ~segment), (least | (offset & ~segment)) <= most),
    }[form["mode"]]()
    from_lane = np.where(inside, threads.lanes - lane + source_lane, threads.lanes)
    if not np.isin(from_lane, threads.lanes).all():
        raise Divergence("a lane that is elsewhere is read")
    full = np.empty(threads.wave.lanes, np.uint32)
    full[threads.lanes] = threads.each(source, "b32")
    if type(target) is Both:
        threads.write(target.predicate, inside)
        target = target.value
    threads.write(target, full[from_lane])


@executes("vote", r"\.sync\.(?P<mode>any|all|uni)\.pred", r"\.sync\.(?P<mode>ballot)\.b32")
def vote(threads, operands, form, name):
    """9.7.13.9: whether a predicate holds for any or all threads of a warp, or for which."""
    count(operands, 3)
    _members(threads, operands[2])
    warp = threads.lanes // WARP
    votes = np.zeros(threads.wave.lanes // WARP, np.uint32)
    holds = threads.each(operands[1], "pred")
    here = np.uint32(1) << (threads.lanes % WARP).astype(np.uint32)
    np.bitwise_or.at(votes, warp, np.where(holds, here, np.uint32(0)))
    asked = np.zeros_like(votes)
    np.bitwise_or.at(asked, warp, here)
    value = {"any": votes != 0, "all": votes == asked, "uni": (votes == 0) | (votes == asked), "ballot": votes}[
        form["mode"]
    ]
    threads.write(operands[0], value[warp])


@executes(
    "redux",
    r"\.sync\.(?P<op>max|min)(?P<abs>\.abs)?(?P<nan>\.NaN)?\.f32",
    r"\.sync\.(?P<op>add|min|max)\.(?P<type>[su]32)",
)
def reduce(threads, operands, form, name):
    """9.7.13.12: one value for all threads of the warp."""
    count(operands, 3)
    _members(threads, operands[2])
    values = threads.warps(threads.read(operands[1], form.groupdict().get("type") or "f32"))
    value = {"max": np.fmax, "min": np.fmin, "add": np.add}[form["op"]].reduce(values, 1)
    threads.write(operands[0], np.repeat(value, WARP))


@executes("elect", r"\.sync")
def elect(threads, operands, form, name):
    """9.7.13.14: the predicate is true for one thread of the warp, the first one."""
    count(operands, 2)
    _members(threads, operands[1])
    leaders = threads.warps()[:, :1]
    threads.write(operands[0].value, np.zeros(len(threads.lanes), np.uint32))
    threads.write(operands[0].predicate, (threads.warps() == leaders).ravel())
