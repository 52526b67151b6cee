"""A small kernel of specialized warps for the executor's own tests:
one warp copies, a warp group multiplies, and the two meet at mbarriers alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _copy(x, y, xs, ys, full, empty, steps, BLOCK: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr):
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * BLOCK * DEPTH * 2)
        tma.async_copy_global_to_shared(x, [0, step * DEPTH], full.index(stage), xs.index(stage))
        tma.async_copy_global_to_shared(y, [0, step * DEPTH], full.index(stage), ys.index(stage))


@gluon.jit
def _multiply(out_ptr, xs, ys, full, empty, steps, M, BLOCK: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    acc = gl.zeros([BLOCK, BLOCK], gl.float32, layout)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        product = warpgroup_mma(xs.index(stage), ys.index(stage).permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(empty.index(stage), count=1)
    rows = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    gl.store(out_ptr + rows[:, None] * BLOCK + columns[None, :], acc, mask=(rows < M)[:, None])


@gluon.jit
def products(x, y, out_ptr, M, steps, BLOCK: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr):
    """out [M, BLOCK] = x [M, D] @ y [BLOCK, D].T for M up to BLOCK, with D = steps * DEPTH."""
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK, DEPTH], x.layout)
    ys = gl.allocate_shared_memory(y.dtype, [STAGES, BLOCK, DEPTH], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (_multiply, (out_ptr, xs, ys, full, empty, steps, M, BLOCK, DEPTH, STAGES)),
            (_copy, (x, y, xs, ys, full, empty, steps, BLOCK, DEPTH, STAGES)),
        ],
        [1],
        [24],
    )
