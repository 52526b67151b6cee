"""Ahead-of-time compilation of every shipped Triton configuration, without a GPU: the code is read for tensor cores, spills and shared memory."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is an optional dependency of the kernels")

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

# Compiled in a process of its own: the suite's may have the interpreter switched on.
SCRIPT = """
    import sys
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from dreamlip_kernels import contrastive_triton as module

    arch, folder = int(sys.argv[1]), sys.argv[2]
    masks = dict(x_mask_ptr="*i1", y_mask_ptr="*i1", scale_ptr="*fp32", M="i32", C="i32", D="i32")
    for kernel, config in (("exp_sums", module.forward_blocks(arch)), ("gradient_tile", module.gradient_blocks(arch))):
        m, c, d, warps, stages = config
        blocks = dict(BLOCK_M=m, BLOCK_C=c, BLOCK_D=d)
        for masked in (False, True):
            signature = dict(masks, x_desc=f"tensordesc<fp16[{m},{d}]>", y_desc=f"tensordesc<fp16[1,{c},{d}]>")
            if kernel == "exp_sums":
                signature |= dict(row_ptr="*fp32", col_ptr="*fp32", first_tile="i32", row_tiles_stride="i32", band_rows="i32")
                constants = dict(HAS_X_MASK=masked, HAS_Y_MASK=masked, MASK_COLUMNS=masked, **blocks)
            else:
                signature |= dict(flag_ptr="*i32", row_ptr="*fp32", col_ptr="*fp32", g_ptr="*fp16")
                signature |= dict.fromkeys(("slot", "first_row", "first_col", "rows", "cols", "diagonal"), "i32")
                constants = dict(EXACT=False, HAS_X_MASK=masked, HAS_Y_MASK=masked, HAS_DIAGONAL=True, **blocks)
            names = getattr(module, kernel).arg_names
            full = {name: signature.get(name, "constexpr") for name in names}
            source = ASTSource(getattr(module, kernel), signature=full, constexprs=constants)
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=warps, num_stages=stages))
            path = f"{folder}/{kernel}-{'masked' if masked else 'plain'}.cubin"
            open(path, "wb").write(built.asm["cubin"])
            print(path, built.metadata.shared)
"""


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shipped_configurations(arch, tmp_path):
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(arch), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")})
    assert run.returncode == 0, run.stderr
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    lines = run.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        path, shared = line.split()
        code = subprocess.run([disassembler, path], capture_output=True, text=True, check=True).stdout
        assert re.search(rf"\b{TENSOR_CORE[arch]}\b", code), f"{path}: no tensor-core instruction"
        spills = len(re.findall(r"\b(LDL|STL)\b", code))
        assert arch == 100 or spills == 0, f"{path}: {spills} spill instructions"
        assert int(shared) <= SHARED_LIMIT[arch], f"{path}: {shared} bytes of shared memory"
