"""The sigmoid loss's Triton kernel compiled ahead of time, without a GPU: tensor cores, asynchronous loads, no spills,
two programs on a processor.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is an optional dependency of the kernels")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

# In a process of its own: the suite's has the interpreter switched on.
SCRIPT = """
    import sys
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from dreamlip_kernels.ops.sigmoid_pairs.sigmoid_pairs_kernels import sigmoid_tile
    from dreamlip_kernels.ops.sigmoid_pairs.sigmoid_pairs_triton import blocks_for, compile_options

    arch, path, dtype = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    blocks = blocks_for(4 if dtype == "fp32" else 2, arch // 10)
    m, c, d, warps, _ = blocks
    descriptor = arch >= 90
    x, y = (f"tensordesc<{dtype}[{rows},{d}]>" if descriptor else f"*{dtype}" for rows in (m, c))
    signature = dict(x=x, y=y, x_mask_ptr="*i1", y_mask_ptr="*i1")
    signature |= dict(x_images_ptr="*i32", y_images_ptr="*i32", scale_ptr="*fp32", g_ptr=f"*{dtype}", sums_ptr="*fp32")
    constants = dict(HAS_X_MASK=True, HAS_Y_MASK=True, GRADIENT=True, SAME_IS_POSITIVE=sys.argv[4] == "positive")
    if sys.argv[4] == "none":
        constants |= dict(x_images_ptr=None, y_images_ptr=None)
    constants |= dict(BLOCK_M=m, BLOCK_C=c, BLOCK_D=d, DESCRIPTOR=descriptor)
    constants["PRECISION"] = "tf32x3" if dtype == "fp32" else "tf32"
    names = sigmoid_tile.arg_names
    signature = {name: "constexpr" if name in constants else signature.get(name, "i32") for name in names}
    aligned = ("D", "stride_x", "stride_y", "stride_g")
    by_sixteen = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in aligned]
    attrs = {(i,): [["tt.divisibility", 16]] for i in by_sixteen}
    source = ASTSource(sigmoid_tile, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=compile_options(blocks))
    open(path, "wb").write(built.asm["cubin"])
    print(built.metadata.shared, 32 * warps)
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize("arch", [80, 90, pytest.param(100, marks=SLOW)])
@pytest.mark.parametrize(
    "dtype, same_image",
    [
        ("bf16", "none"),
        pytest.param("bf16", "ignore", marks=SLOW),
        pytest.param("bf16", "positive", marks=SLOW),
        pytest.param("fp32", "none", marks=SLOW),
        pytest.param("fp32", "positive", marks=SLOW),
    ],
)
def test_compiled_code(arch, dtype, same_image, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cubin = tmp_path / "sigmoid_tile.cubin"
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(arch), str(cubin), dtype, same_image]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    code = subprocess.run([TOOLS / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    wanted = r"UTC\w*MMA" if (arch, dtype) == (100, "fp32") else TENSOR_CORE[arch]
    assert re.search(rf"\b{wanted}\b", code), "no tensor-core instruction"
    assert re.search(rf"\b{'UTMALDG' if arch >= 90 else 'LDGSTS'}\b", code), "loads are not asynchronous"
    assert arch == 100 or not re.search(r"\b(LDL|STL)\b", code), "spills"
    shared, threads = map(int, run.stdout.split())
    assert 2 * shared <= (163 if arch == 80 else 227) * 1024
    assert 2 * threads * int(re.search(r"REG:(\d+)", usage)[1]) <= 65536, "a second program does not fit on a processor"
