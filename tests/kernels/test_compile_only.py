"""Ahead-of-time compilation of every shipped Triton configuration, without a GPU: the code is read for tensor cores, spills and shared memory."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is an optional dependency of the kernels")

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

# Compiled in a process of its own: the suite's may have the interpreter switched on.
SCRIPT = """
    import sys
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from dreamlip_kernels.ops import logsumexp_kernels as module
    from dreamlip_kernels.ops.logsumexp_tiles import ONLINE, blocks_for

    arch, folder, dtype, size = int(sys.argv[1]), sys.argv[2], sys.argv[3], 4 if sys.argv[3] == "fp32" else 2
    descriptor = arch >= 90
    strides = ("D", "stride_x", "stride_yk", "stride_y")
    masks = dict(x_mask_ptr="*i1", y_mask_ptr="*i1", scale_ptr="*fp32", M="i32", C="i32", **dict.fromkeys(strides, "i32"))
    precision = "tf32x3" if size == 4 else "tf32"

    def build(kernel, variant, signature, constants, warps, stages):
        names = getattr(module, kernel).arg_names
        full = {name: signature.get(name, "constexpr") for name in names}
        # As in a run on features of a width in multiples of 16.
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if full[name].startswith("*") or name in strides}
        source = ASTSource(getattr(module, kernel), signature=full, constexprs=constants, attrs=aligned)
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=warps, num_stages=stages))
        path = f"{folder}/{kernel}-{variant}.cubin"
        open(path, "wb").write(built.asm["cubin"])
        print(path, built.metadata.shared)

    for kernel, masked, exact in (("exp_sums", 0, 0), ("exp_sums", 1, 0), ("gradient_tile", 0, 0), ("gradient_tile", 1, 0), ("gradient_tile", 1, 1)):
        m, c, d, warps, stages = blocks_for(kernel, size, arch, 512)
        blocks = dict(BLOCK_M=m, BLOCK_C=c, BLOCK_D=d, PRECISION=precision, DESCRIPTOR=descriptor)
        operands = dict(x=f"tensordesc<{dtype}[{m},{d}]>", y=f"tensordesc<{dtype}[1,{c},{d}]>") if descriptor else dict(x=f"*{dtype}", y=f"*{dtype}")
        signature = masks | operands
        if kernel == "exp_sums":
            signature |= dict(row_ptr="*fp32", col_ptr="*fp32", first_tile="i32", row_tiles_stride="i32", band_rows="i32")
            constants = dict(HAS_X_MASK=bool(masked), HAS_Y_MASK=bool(masked), MASK_COLUMNS=bool(masked), **blocks)
        else:
            signature |= dict(flag_ptr="*i32", row_ptr="*fp32", col_ptr="*fp32", g_ptr=f"*{dtype}")
            signature |= dict.fromkeys(("slot", "first_row", "first_col", "rows", "cols", "diagonal"), "i32")
            constants = dict(EXACT=bool(exact), HAS_X_MASK=bool(masked), HAS_Y_MASK=bool(masked), HAS_DIAGONAL=True, **blocks)
        build(kernel, "exact" if exact else "masked" if masked else "plain", signature, constants, warps, stages)
    names = module.online_rows.arg_names
    strides = tuple(name for name in names if name.startswith("stride") or name == "D")
    signature = dict(flag_ptr="*i32", q_mask_ptr="*i1", k_mask_ptr="*i1", scale_ptr="*fp32", out_ptr="*fp32", R="i32", S="i32", D="i32")
    signature |= dict.fromkeys(("q_ptr", "k_ptr"), f"*{dtype}")
    signature |= {name: "i32" for name in names if name.islower() and name not in signature}
    rows, columns, depth, warps, stages = ONLINE[size]
    constants = dict(HAS_Q_MASK=True, HAS_K_MASK=True, PRECISION=precision, BLOCK_R=rows, BLOCK_S=columns, BLOCK_D=depth)
    build("online_rows", "exact", signature, constants, warps, stages)
"""


GROUPING = """
    import sys
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from dreamlip_kernels.ops import group_patches_triton as module

    arch, folder, kp, dtype = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
    block_p, block_d, warps, stages = module.BLOCKS[kp, dtypes[dtype]]
    for kernel in ("pool_forward", "pool_backward"):
        names = getattr(module, kernel).arg_names
        stored = ("x_ptr", "t_ptr", "up_ptr", "out_ptr", "dx_ptr", "dt_ptr")
        signature = {name: f"*{dtype}" if name in stored else "*fp32" for name in names if name.endswith("_ptr")}
        signature |= {name: "i32" for name in names if name in ("K", "P", "D") or name.startswith("stride")} | {"threshold": "fp32", "mask_ptr": "*i1"}
        full = {name: signature.get(name, "constexpr") for name in names}
        # As in a run on contiguous features of a width in multiples of 16.
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr") or name == "D" or name.startswith("stride")}
        constants = dict(NORMALIZATION=0, HAS_MASK=True, PRECISION="tf32x3" if dtype == "fp32" else "tf32")
        constants |= dict(KP=kp, BLOCK_P=block_p, BLOCK_D=block_d)
        source = ASTSource(getattr(module, kernel), signature=full, constexprs=constants, attrs=aligned)
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=warps, num_stages=stages))
        path = f"{folder}/{kernel}.cubin"
        open(path, "wb").write(built.asm["cubin"])
        print(path, built.metadata.shared)
"""


def compiled(script, tmp_path, *arguments):
    """(file, code as text, bytes of shared memory) of every kernel the script compiles, in a process without the interpreter."""
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path / "cache")
    }
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    for line in run.stdout.splitlines():
        path, shared = line.split()
        yield path, subprocess.run([disassembler, path], capture_output=True, text=True, check=True).stdout, int(shared)


def registers(path):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return int(
        re.search(
            r"REG:(\d+)", subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        )[1]
    )


def check(path, code, shared, arch, tensor_core):
    assert re.search(rf"\b({tensor_core})\b", code), f"{path}: no tensor-core instruction"
    spills = len(re.findall(r"\b(LDL|STL)\b", code))
    assert arch == 100 or spills == 0, f"{path}: {spills} spill instructions"
    assert shared <= SHARED_LIMIT[arch], f"{path}: {shared} bytes of shared memory"


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    "dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow), pytest.param("fp32", marks=pytest.mark.slow)]
)
def test_shipped_configurations(arch, dtype, tmp_path):
    built = list(compiled(SCRIPT, tmp_path, arch, tmp_path, dtype))
    assert len(built) == 6
    for path, code, shared in built:
        # TF32 products are another instruction of sm_100.
        check(path, code, shared, arch, r"UTC\w*MMA" if (arch, dtype) == (100, "fp32") else TENSOR_CORE[arch])
        always_runs = "exact" not in path
        if dtype != "fp32" and always_runs:
            assert registers(path) <= 128, f"{path}: a second program does not fit on a processor"
        copies = "UTMALDG" if arch >= 90 and "online" not in path else "LDGSTS"  # TMA, cp.async
        assert re.search(rf"\b{copies}\b", code), f"{path}: loads are not asynchronous"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "arch, kp, dtype",
    [
        (80, 16, "bf16"),
        (90, 16, "fp16"),
        pytest.param(80, 16, "fp16", marks=SLOW),
        pytest.param(90, 16, "fp32", marks=SLOW),
        pytest.param(80, 16, "fp32", marks=SLOW),
        pytest.param(90, 16, "bf16", marks=SLOW),
        pytest.param(100, 16, "bf16", marks=SLOW),
    ]
    + [pytest.param(arch, 32, dtype, marks=SLOW) for arch in (80, 90) for dtype in ("bf16", "fp16", "fp32")],
)
def test_grouping_configurations(arch, kp, dtype, tmp_path):
    """M is 16 or 32, below what wgmma takes with these tiles: mma.sync is the tensor-core instruction, and fast enough (performance is memory's)."""
    built = list(compiled(GROUPING, tmp_path, arch, tmp_path, kp, dtype))
    assert len(built) == 2
    for path, code, shared in built:
        check(path, code, shared, arch, "HMMA|HGMMA|UTCHMMA")


NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize(
    "arch", [80, 90, pytest.param(86, marks=SLOW), pytest.param(89, marks=SLOW), pytest.param(120, marks=SLOW)]
)
def test_cuda_kernels(arch, tmp_path):
    """Registers, spills and tensor-core instructions of csrc/*.cuh as nvcc builds it; float16 differs from bfloat16 in one instruction."""
    cubin = tmp_path / "kernels.cubin"
    flags = [
        "-O3",
        "-std=c++17",
        "--expt-relaxed-constexpr",
        f"-arch=sm_{arch}",
        "-cubin",
        "-Xptxas",
        "-v",
        "-I",
        ROOT / "csrc",
    ]
    command = [NVCC, *flags, ROOT / "tests/csrc/compile_only.cu", "-o", cubin]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", run.stderr)]
    assert len(spills) == len(registers) == 14 and all(pair == ("0", "0") for pair in spills), run.stderr
    # 256 threads a block of the grouping; of the contrast 128, two blocks a processor.
    assert max(registers) <= 255
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    code = subprocess.run([disassembler, cubin], capture_output=True, text=True, check=True).stdout
    for instruction in ("HMMA", "LDSM", "LDGSTS"):
        assert len(re.findall(rf"\b{instruction}\b", code)) >= 14, f"no {instruction}"
    assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", code), "local memory or atomics"
