"""The executor itself, on PTX written by hand: each rule that it holds kernels to, by a kernel that breaks it."""

import pytest
import torch
from ptx import (
    FIRST_AHEAD,
    LAST_AHEAD,
    TOGETHER,
    AsyncHazard,
    BadOperand,
    Deadlock,
    Divergence,
    Misaligned,
    OutOfBounds,
    UnknownInstruction,
    WrongParameters,
    execute,
    shuffled,
)
from ptx import schedule as schedule_module

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 in_ptr, .param .u64 out_ptr, .param .u32 n)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<40>;
    .reg .f32 %f<40>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [in_ptr];
    ld.param.u64 %rd2, [out_ptr];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    shl.b32 %r3, %r2, 2;
"""


def run(body, n=64, schedule=TOGETHER, dtype=torch.float32, inputs=None, **options):
    """The result [n] of a block of 64 threads: %rd4 and %rd5 are a thread's elements of the input and of the output,
    %r2
    its number, %r3 four times that."""
    out = torch.full((n,), torch.nan) if dtype.is_floating_point else torch.full((n,), -1, dtype=dtype)
    inputs = torch.arange(64).to(dtype) if inputs is None else inputs
    execute(HEADER + body + "ret;\n}", [inputs, out, n], (1, 1, 1), shared_bytes=1024, schedule=schedule, **options)
    return out


def test_threads_and_memory():
    out = run("ld.global.f32 %f1, [%rd4]; add.f32 %f2, %f1, 0f3F800000; st.global.f32 [%rd5], %f2;")
    assert torch.equal(out, torch.arange(64) + 1.0)


@pytest.mark.parametrize(
    "body, expected",
    [
        ("mul.hi.u32 %r4, %r2, 0xFFFFFFFF;", lambda t: (t - 1).clamp(min=0)),
        ("sub.s32 %r4, %r2, 20; shr.s32 %r4, %r4, 2;", lambda t: (t - 20) >> 2),
        ("sub.s32 %r4, %r2, 20; div.s32 %r4, %r4, 7;", lambda t: torch.div(t - 20, 7, rounding_mode="trunc")),
        ("sub.s32 %r4, %r2, 20; rem.s32 %r4, %r4, 7;", lambda t: torch.fmod(t - 20, 7)),
        ("bfe.u32 %r4, %r2, 1, 3;", lambda t: t >> 1 & 7),
        ("bfe.s32 %r4, %r2, 0, 3;", lambda t: ((t & 7) ^ 4) - 4),
        ("bfi.b32 %r4, %r2, 0, 4, 3;", lambda t: (t & 7) << 4),
        ("setp.lt.u32 %p1, %r2, 9; selp.b32 %r4, 5, %r2, %p1;", lambda t: torch.where(t < 9, 5, t)),
        ("mov.b32 {%h1, %h2}, %r2; mov.b32 %r4, {%h2, %h1};", lambda t: t << 16),
        ("shl.b32 %r4, %r2, 40;", lambda t: 0 * t),
        ("mad.lo.s32 %r4, %r2, 3, 4;", lambda t: 3 * t + 4),
        ("cvt.rn.f32.s32 %f1, %r2; cvt.rzi.s32.f32 %r4, %f1;", lambda t: t),
        ("shfl.sync.bfly.b32 %r4, %r2, 5, 31, -1;", lambda t: t ^ 5),
        ("shfl.sync.down.b32 %r4, %r2, 3, 31, -1;", lambda t: torch.where(t % 32 < 29, t + 3, t)),
        ("shfl.sync.idx.b32 %r4, %r2, 7, 31, -1;", lambda t: t // 32 * 32 + 7),
        ("setp.eq.u32 %p1, %r2, 40; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r4, 1, 0, %p2;", lambda t: t // 32),
        ("elect.sync %r5|%p1, -1; selp.b32 %r4, 1, 0, %p1;", lambda t: (t % 32 == 0).long()),
    ],
)
def test_integers_and_exchanges(body, expected):
    out = run(body + "st.global.u32 [%rd5], %r4;", dtype=torch.int32)
    assert torch.equal(out, expected(torch.arange(64)).int())


def test_branches_meet_again():
    """Half of each warp takes one way, a quarter loops: all are together at the exchange behind."""
    body = """
        mov.u32 %r4, 0;
        and.b32 %r5, %r2, 1;
        setp.eq.u32 %p1, %r5, 0;
        @%p1 bra EVEN;
        mov.u32 %r4, 100;
        bra.uni MEET;
    EVEN:
        add.s32 %r4, %r4, 1;
        and.b32 %r6, %r2, 7;
        setp.lt.u32 %p2, %r4, %r6;
        @%p2 bra EVEN;
    MEET:
        shfl.sync.bfly.b32 %r7, %r4, 1, 31, -1;
        st.global.u32 [%rd5], %r7;
    """
    t = torch.arange(64)
    own = torch.where(t % 2 == 1, 100, (t % 8).clamp(min=1))
    assert torch.equal(run(body, dtype=torch.int32), own[t ^ 1].int())


SHARED = """
    ld.global.f32 %f1, [%rd4];
    st.shared.f32 [%r3], %f1;
    {0}
    xor.b32 %r4, %r3, 128;
    ld.shared.f32 %f2, [%r4];
    st.global.f32 [%rd5], %f2;
"""


@pytest.mark.parametrize("schedule", [TOGETHER, FIRST_AHEAD, LAST_AHEAD, shuffled(1)], ids=str)
def test_a_missing_barrier_shows_where_one_warp_is_ahead(schedule):
    """Shared memory begins as NaN, and the warp that is ahead reads it."""
    assert torch.equal(run(SHARED.format("bar.sync 0;"), schedule=schedule), torch.arange(64.0).roll(32))
    if schedule is not TOGETHER:
        assert run(SHARED.format(""), schedule=schedule).isnan().sum() == 32


COPY = """
    cp.async.ca.shared.global [%r3], [%rd4], 4;
    cp.async.commit_group;
    {0}
    bar.sync 0;
    ld.shared.f32 %f2, [%r3];
    st.global.f32 [%rd5], %f2;
"""


def test_copies_land_at_their_wait():
    assert torch.equal(run(COPY.format("cp.async.wait_group 0;")), torch.arange(64.0))
    assert run(COPY.format("cp.async.wait_group 1;")).isnan().all()
    assert run(COPY.format("")).isnan().all()


def test_copies_of_fewer_bytes_leave_zeros():
    body = "setp.lt.u32 %p1, %r2, 10; selp.b32 %r9, 4, 0, %p1; cp.async.ca.shared.global [%r3], [%rd4], 4, %r9;"
    body += "cp.async.wait_all; ld.shared.f32 %f2, [%r3]; st.global.f32 [%rd5], %f2;"
    assert torch.equal(run(body), torch.arange(64.0) * (torch.arange(64) < 10))


MESSAGES = """
    mov.u32 %r10, 512;
    setp.eq.u32 %p1, %r2, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r10], {count};
    bar.sync 0;
    setp.lt.u32 %p2, %r2, 32;
    @%p2 bra WAIT;
    mbarrier.arrive.shared::cta.b64 _, [%r10];
    bra.uni DONE;
WAIT:
    {{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared.b64 complete, [%r10], {parity};
    @!complete bra.uni waitLoop;
    }}
DONE:
    cvt.rn.f32.u32 %f2, %r2;
    st.global.f32 [%rd5], %f2;
"""


@pytest.mark.parametrize("schedule", [TOGETHER, FIRST_AHEAD, LAST_AHEAD], ids=str)
def test_message_barriers(schedule):
    assert torch.equal(run(MESSAGES.format(count=32, parity=0), schedule=schedule), torch.arange(64.0))
    assert torch.equal(run(MESSAGES.format(count=64, parity=1), schedule=schedule), torch.arange(64.0))
    with pytest.raises(Deadlock, match=r"32 threads wait at line \d+: mbarrier.try_wait"):
        run(MESSAGES.format(count=33, parity=0), schedule=schedule)
    with pytest.raises(BadOperand, match="more arrivals"):
        run(
            MESSAGES.format(count=20, parity=1).replace(
                "bra.uni DONE", "mbarrier.arrive.shared::cta.b64 _, [%r10], 20; bra.uni DONE"
            )
        )


STORE = "mov.f32 %f1, 0f00000000; {0} st.global.f32 [%rd5{1}], %f1;"


@pytest.mark.parametrize(
    "body, kind, message",
    [
        ("tcgen05.fence::after_thread_sync;", UnknownInstruction, "tcgen05.*does not know this instruction"),
        ("add.rz.f32 %f1, %f2, %f3;", UnknownInstruction, "add.rz.f32: the executor does not know this form of it"),
        ("add.f32 %f1, %f2;", BadOperand, "2 operands, expected 3"),
        ("add.f32 %f1, %f2, %nothing;", BadOperand, "'%nothing' is not declared"),
        ("bra NOWHERE;", BadOperand, "no label 'NOWHERE'"),
        (STORE.format("", "+4"), OutOfBounds, "store of 4 bytes at byte 256 of argument 1, which has 256 bytes"),
        (STORE.format("", "+-4"), OutOfBounds, "store of 4 bytes at byte -4 of argument 1"),
        (STORE.format("", "+2"), Misaligned, "store of 4 bytes"),
        ("mov.u64 %rd6, 64; ld.global.f32 %f1, [%rd6];", OutOfBounds, "address of no tensor"),
        ("ld.shared.f32 %f1, [%r3+800];", OutOfBounds, "byte 1052 of shared memory, which has 1024 bytes"),
        ("setp.eq.u32 %p1, %r2, 0; @%p1 bra SKIP; bar.sync 0; SKIP:", Deadlock, "63 threads wait at barrier 0"),
        ("bar.sync 0, 32;", BadOperand, "64 threads at barrier 0, which expects 32"),
        ("setp.eq.u32 %p1, %r2, 0; @%p1 shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;", Divergence, "elsewhere"),
        ("cp.async.ca.shared.global [%r3+2], [%rd4], 4;", Misaligned, "asynchronous copy of 4 bytes"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r3];", BadOperand, "no barrier was made at byte 0"),
        ("fence.proxy.alias;", UnknownInstruction, "fence.proxy.alias"),
    ],
)
def test_what_a_kernel_may_not_do(body, kind, message):
    with pytest.raises(kind, match=message):
        run(body)


def test_messages_say_where():
    with pytest.raises(OutOfBounds, match=r"\[line \d+, block 0, threads from 0: st\.global\.f32 \[%rd5\+4\], %f1\]"):
        run(STORE.format("", "+4"))


def test_a_kernel_ends(monkeypatch):
    monkeypatch.setattr(schedule_module, "LONGEST", 1000)
    with pytest.raises(Deadlock, match="no end after"):
        run("AGAIN: add.s32 %r4, %r4, 1; bra.uni AGAIN;")
    with pytest.raises(BadOperand, match="kernel ends without ret"):
        execute(HEADER + "}", [torch.zeros(64), torch.zeros(64), 1], (1, 1, 1))


@pytest.mark.parametrize(
    "arguments", [[torch.zeros(64), torch.zeros(64)], [torch.zeros(64)] * 2 + [1, 2], [b"1234", torch.zeros(64), 1]]
)
def test_wrong_parameters(arguments):
    with pytest.raises(WrongParameters):
        execute(HEADER + "ret;\n}", arguments, (1, 1, 1))


def product(descriptor=(64 << 4 | 1) << 12, fence="wgmma.fence.sync.aligned;", between="", wait=0):
    """Ones [64, 16] times what shared memory holds, by one warp group: PTX with 64 threads makes two of its warps."""
    zeros = "".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(1, 5))
    return f"""
        mov.b32 %r20, 0x3F803F80;
        mov.b32 %r21, 0x3F803F80;
        shl.b32 %r22, %r2, 3;
        setp.lt.u32 %p1, %r2, 32;
        @%p1 st.shared.v2.b32 [%r22], {{%r20, %r21}};
        {between}
        bar.sync 0;
        {zeros}
        mov.b64 %rd6, {descriptor};
        {fence}
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f1, %f2, %f3, %f4}}, {{%r20, %r20, %r20, %r20}}, %rd6,
        1, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned {wait};
        st.global.f32 [%rd5], %f1;
    """


PLAIN = 8 << 16 | 16 << 32  # no swizzle: 8 rows of 16 bytes, then the second half of the columns 128 bytes further
FENCE = "fence.proxy.async.shared::cta;"


def test_products_of_a_warp_group():
    """16 columns of ones times ones."""
    assert torch.equal(run(product(PLAIN, between=FENCE)), torch.full((64,), 16.0))
    assert run(product(PLAIN, between=FENCE, wait=1)).isnan().all()
    with pytest.raises(AsyncHazard, match=r"without fence\.proxy\.async"):
        run(product(PLAIN))
    with pytest.raises(AsyncHazard, match=r"no wgmma\.fence"):
        run(product(PLAIN, fence="", between=FENCE))
    with pytest.raises(AsyncHazard, match="changed between its issue and its wait"):
        late = "wgmma.commit_group.sync.aligned; st.shared.b32 [%r22], %r1;"
        run(product(PLAIN, between=FENCE).replace("wgmma.commit_group.sync.aligned;", late))


@pytest.mark.parametrize(
    "bits, kind, message",
    [
        (PLAIN | 1 << 14, BadOperand, "matrix descriptor 0x[0-9a-f]+: reserved bits are set"),
        (PLAIN | 1 << 49, BadOperand, "base offset"),
        (1 << 62 | 64 << 32 | 8, Misaligned, "matrix descriptor 0x[0-9a-f]+: its start 128 is not in the first row"),
        (PLAIN | 63, OutOfBounds, "a matrix that reaches byte 1[0-9]+ of shared memory"),
    ],
)
def test_descriptors(bits, kind, message):
    with pytest.raises(kind, match=message):
        run(product(bits, between=FENCE))
