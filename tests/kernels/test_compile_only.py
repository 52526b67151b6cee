"""Ahead-of-time compilation of every shipped Triton configuration, without a GPU: the code is read for tensor cores,
spills and shared memory.
"""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is an optional dependency of the kernels")

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_CORE = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}

# Compiled in a process of its own: the suite's may have the interpreter switched on.
SCRIPT = """
    import sys
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from dreamlip_kernels.ops.logsumexp.kernels import finish_kernels, gradient_kernels, sums_kernels, vector_kernels
    from dreamlip_kernels.ops.logsumexp.logsumexp_tiles import FINISH, blocks_for
    from dreamlip_kernels.ops.logsumexp.operands_triton import TMA_MAJORS

    arch, folder, dtype, width = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    size = 4 if dtype == "fp32" else 2
    descriptor = arch // 10 in TMA_MAJORS
    pointers = dict.fromkeys(("x_mask_ptr", "y_mask_ptr", "q_mask_ptr", "k_mask_ptr"), "*i1") | dict(flag_ptr="*i32")
    images = ("x_images_ptr", "y_images_ptr", "q_images_ptr", "k_images_ptr")
    pointers |= dict.fromkeys(images, "*i32")
    which = (*sys.argv[5:], "all")[0]
    compared = which == "images"
    pointers |= dict.fromkeys(("x", "y", "q_ptr", "k_ptr", "v_ptr", "self_ptr", "g_ptr", "out_ptr"), f"*{dtype}")

    def build(module, kernel, variant, constants, warps, stages, **types):
        function = getattr(module, kernel)
        if not compared:
            constants |= {name: None for name in images if name in function.arg_names}
        names = [name for name in function.arg_names if name not in constants]
        default = lambda name: "*fp32" if name.endswith("_ptr") else "i32"  # noqa: E731
        full = {name: types.get(name) or pointers.get(name) or default(name) for name in names}
        full = {name: full.get(name, "constexpr") for name in function.arg_names}
        # As in a run on features of this width: what may vary is not specialized on, and operands are padded to 16.
        varying = {p.name for p in function.params if p.do_not_specialize}
        if width % 16 and kernel == "finish_gradient":
            varying |= {"D", "out_q", "out_r"}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(function.arg_names)
            if full[name].startswith("*") or (full[name] == "i32" and name not in varying)
        }
        source = ASTSource(function, signature=full, constexprs=constants, attrs=aligned)
        options = dict(num_warps=warps, num_stages=stages)
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        path = f"{folder}/{kernel}-{variant}.cubin"
        open(path, "wb").write(built.asm["cubin"])
        open(path.replace("cubin", "ptx"), "w").write(built.asm["ptx"])
        print(path, built.metadata.shared)

    if which == "untouched":
        import untouched_tiles
        sums_kernels.without_same_image = gradient_kernels.without_same_image = untouched_tiles.without_same_image
    masked_kernels = ("exp_sums", 1, 0), ("gradient_tile", 1, 0)
    rest = {"images": [("gradient_tile", 1, 1)]}
    rest["all"] = [("exp_sums", 0, 0), ("gradient_tile", 0, 0), *rest["images"]]
    for kernel, masked, exact in (*masked_kernels, *rest.get(which, [])):
        m, c, d, warps, stages = blocks_for(kernel, size, arch, width)
        constants = {} if masked else dict(x_mask_ptr=None, y_mask_ptr=None)
        constants |= dict(BLOCK_M=m, BLOCK_C=c, BLOCK_D=d, DESCRIPTOR=descriptor)
        operands = dict(x=f"tensordesc<{dtype}[{m},{d}]>", y=f"tensordesc<{dtype}[1,{c},{d}]>") if descriptor else {}
        module = sums_kernels if kernel == "exp_sums" else gradient_kernels
        constants |= dict(MASK_COLUMNS=bool(masked)) if kernel == "exp_sums" else dict(EXACT=bool(exact))
        variant = "exact" if exact else "masked" if masked else "plain"
        build(module, kernel, variant, constants, warps, stages, **operands)
    if which not in rest:
        sys.exit()
    rows, columns, warps, stages = FINISH[size]
    depth = blocks_for("exp_sums", size, arch, width).d
    constants = dict(BLOCK_R=rows, BLOCK_S=columns, BLOCK_D=depth, BLOCK_PARTS=16)
    build(finish_kernels, "finish_sums", "exact", constants, warps, stages, out_ptr="*fp32")
    if compared:
        sys.exit()
    shape = dict(BLOCK=1024, BLOCK_R=16, BLOCK_D=128)
    features = "x_ptr y_ptr x_mask_ptr y_mask_ptr x_out_ptr y_out_ptr numbers_ptr".split()
    build(vector_kernels, "vectors", "coefficients", shape | dict.fromkeys(features), 4, 3)
    build(vector_kernels, "vectors", "float16", dict(shape), 4, 3, x_out_ptr="*fp16", y_out_ptr="*fp16")
    shape = dict(BLOCK_R=16, BLOCK_D=128, numbers_ptr=None)
    build(vector_kernels, "finish_gradient", "vectors", shape, 4, 3)
"""


GROUPING = """
    import sys
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from dreamlip_kernels.ops.group_patches import group_patches_triton as module

    arch, folder, kp, dtype = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
    block_p, block_d, warps, stages = module.BLOCKS[kp, dtypes[dtype]]
    for kernel in ("pool_forward", "pool_backward"):
        names = getattr(module, kernel).arg_names
        stored = ("x_ptr", "t_ptr", "up_ptr", "out_ptr", "dx_ptr", "dt_ptr")
        signature = {name: f"*{dtype}" if name in stored else "*fp32" for name in names if name.endswith("_ptr")}
        signature |= {name: "i32" for name in names if name in ("K", "P", "D") or name.startswith("stride")}
        signature |= {"threshold": "fp32", "mask_ptr": "*i1"}
        full = {name: signature.get(name, "constexpr") for name in names}
        # As in a run on contiguous features of a width in multiples of 16.
        by_sixteen = [i for i, name in enumerate(names) if name.endswith("_ptr") or name == "D" or name[:6] == "stride"]
        aligned = {(i,): [["tt.divisibility", 16]] for i in by_sixteen}
        constants = dict(NORMALIZATION=0, HAS_MASK=True, PRECISION="tf32x3" if dtype == "fp32" else "tf32")
        constants |= dict(KP=kp, BLOCK_P=block_p, BLOCK_D=block_d)
        source = ASTSource(getattr(module, kernel), signature=full, constexprs=constants, attrs=aligned)
        options = dict(num_warps=warps, num_stages=stages)
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        path = f"{folder}/{kernel}.cubin"
        open(path, "wb").write(built.asm["cubin"])
        print(path, built.metadata.shared)
"""


def compiled(script, tmp_path, *arguments):
    """(file, code as text, bytes of shared memory) of every kernel the script compiles, in a process without the
    interpreter.
    """
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests/support/kernels"), os.environ.get("PYTHONPATH", "")]
        ),
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
    assert tensor_core is None or re.search(rf"\b({tensor_core})\b", code), f"{path}: no tensor-core instruction"
    spills = len(re.findall(r"\b(LDL|STL)\b", code))
    assert spills == 0, f"{path}: {spills} spill instructions"
    assert shared <= SHARED_LIMIT[arch], f"{path}: {shared} bytes of shared memory"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "arch, dtype, width, which",
    [(90, "fp16", 512, "masked"), pytest.param(90, "fp16", 512, "all", marks=SLOW)]
    + [pytest.param(arch, "bf16", 512, "all", marks=SLOW) for arch in (80, 86, 90, 100, 120)]
    + [pytest.param(arch, "fp32", 512, "all", marks=SLOW) for arch in (80, 86, 90, 100, 120)]
    + [pytest.param(arch, "bf16", 104, "all", marks=SLOW) for arch in (80, 90)],
)
def test_shipped_configurations(arch, dtype, width, which, tmp_path):
    """The two kernels of a masked problem, or all nine."""
    built = list(compiled(SCRIPT, tmp_path, arch, tmp_path, dtype, width, which))
    assert len(built) == {"masked": 2, "all": 9}[which]
    for path, code, shared in built:
        tiled, exact = "vectors" not in path, "exact" in path
        # TF32 products are another instruction of sm_100.
        tensor_core = r"UTC\w*MMA" if (arch, dtype) == (100, "fp32") else TENSOR_CORE[arch]
        check(path, code, shared, arch, tensor_core if tiled else None)
        one_program = (arch, "exp_sums") == (
            90,
            Path(path).name.split("-")[0],
        )  # measured to be faster so, with larger tiles
        if dtype != "fp32" and not exact and not one_program:
            most = 128 if tiled else 255  # of 8 warps, of 4
            assert registers(path) <= most, f"{path}: a second program does not fit on a processor"
        if tiled and not exact:
            copies = "UTMALDG" if arch in (90, 100) else "LDGSTS"  # TMA, cp.async
            assert re.search(rf"\b{copies}\b", code), f"{path}: loads are not asynchronous"
        if (arch, dtype) == (90, "fp16") and "gradient_tile-masked" in path:
            assert shared >= 3 * 2 * (128 * 64) * 2, "three stages fit beside a second program"
        if "gradient_tile" in path:
            assert re.search(r"\bSTG\.E\.128\b", code), f"{path}: stores are not 16 bytes wide"


@pytest.mark.parametrize(
    "arch, dtype",
    [pytest.param(arch, dtype, marks=SLOW) for arch in (80, 86, 90, 100, 120) for dtype in ("bf16", "fp32")],
)
def test_shipped_configurations_that_compare_images(arch, dtype, tmp_path):
    built = list(compiled(SCRIPT, tmp_path, arch, tmp_path, dtype, 512, "images"))
    assert len(built) == 4
    for path, code, shared in built:
        check(path, code, shared, arch, r"UTC\w*MMA" if (arch, dtype) == (100, "fp32") else TENSOR_CORE[arch])


def instructions(path):
    """The PTX beside a cubin, without what tells its source lines."""
    text = Path(path).with_suffix(".ptx").read_text().split(".section\t.debug", 1)[0]
    return [line for line in text.splitlines() if not re.match(r"\s*(\.loc|\.file|//|\$L__(tmp|func)\w*:)", line)]


@pytest.mark.slow
def test_images_that_are_not_compared_leave_no_trace(tmp_path):
    """Off by default, the comparison costs nothing: the kernels without it have the same instructions."""
    ours, without = tmp_path / "ours", tmp_path / "without"
    for folder, which in ((ours, "masked"), (without, "untouched")):
        folder.mkdir()
        assert len(list(compiled(SCRIPT, folder, 80, folder, "bf16", 512, which))) == 2
    for path in sorted(ours.glob("*.cubin")):
        assert instructions(path) == instructions(without / path.name), path.name


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
    """M is 16 or 32, below what wgmma takes with these tiles: mma.sync is the tensor-core instruction,
    and fast enough (performance is memory's).
    """
    built = list(compiled(GROUPING, tmp_path, arch, tmp_path, kp, dtype))
    assert len(built) == 2
    for path, code, shared in built:
        check(path, code, shared, arch, "HMMA|HGMMA|UTCHMMA")


NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
def test_cuda_kernels(arch, tmp_path):
    """Registers, spills and tensor-core instructions of csrc/*.cuh as nvcc builds it;
    float16 differs from bfloat16 in one instruction.
    """
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
    assert len(spills) == len(registers) == 16 and all(pair == ("0", "0") for pair in spills), run.stderr
    # 256 threads a block of the grouping; of the contrast 128, two blocks a processor.
    assert max(registers) <= 255
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    code = subprocess.run([disassembler, cubin], capture_output=True, text=True, check=True).stdout
    for instruction in ("HMMA", "LDSM", "LDGSTS"):
        assert len(re.findall(rf"\b{instruction}\b", code)) >= 16, f"no {instruction}"
    assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", code), "local memory or atomics"
