"""The compiled kernels: which code runs on which CPU, bits that do not depend on threads, and what is said where they
cannot run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import value_and_grads
from patch_cases import region_like

import dreamlip_kernels as dk
from dreamlip_kernels.backends import dispatch, extension

ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support/kernels'}"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=250
    ).stdout


def test_the_installed_package_has_its_kernels():
    """`make install` builds them; every other test of backend="cpp" would fail with this one."""
    assert extension.why_not("cpu") is None and extension.build_info()["torch"].startswith(
        torch.__version__.split("+")[0]
    )
    assert dispatch.select("group_patches", torch.randn(1)) == "cpp" and "csrc: built with" in dk.explain()


SAVE = """
import torch
from numerics import value_and_grads
import dreamlip_kernels as dk
fn = lambda x, t: dk.group_patches(x, t, threshold=0.4, backend="cpp")
torch.save([v for inputs in torch.load("{inputs}") for v in value_and_grads(fn, inputs)], "{outputs}")
"""


def test_one_and_two_threads_give_the_same_bits(tmp_path):
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            patches, texts = (x.requires_grad_() for x in region_like(9, 49, 5, 40))
            pooled = dk.group_patches(patches, texts, backend="cpp")
            outputs.append((pooled, *torch.autograd.grad(pooled.square().sum(), (patches, texts))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("capability", ["avx2", pytest.param("default", marks=pytest.mark.slow)])
def test_older_cpus_run_code_of_their_own(tmp_path, capability):
    """ATEN_CPU_CAPABILITY chooses, as for torch's kernels: the same numbers but for rounding."""
    shapes, dtypes = ((7, 49, 3, 96), (5, 50, 9, 37), (3, 1, 1, 8)), (torch.float32, torch.bfloat16, torch.float64)
    # Drawn once: torch's own kernels round differently at another capability.
    torch.save([region_like(*shape, dtype, 0.4) for shape in shapes for dtype in dtypes], tmp_path / "in.pt")
    run(SAVE.format(inputs=tmp_path / "in.pt", outputs=tmp_path / "old.pt"), ATEN_CPU_CAPABILITY=capability)
    fn = lambda x, t: dk.group_patches(x, t, threshold=0.4, backend="cpp")  # noqa: E731
    newer = [value for inputs in torch.load(tmp_path / "in.pt") for value in value_and_grads(fn, inputs)]
    for old, own in zip(torch.load(tmp_path / "old.pt"), newer, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[own.dtype]
        torch.testing.assert_close(old, own, atol=tolerance * own.abs().max().item(), rtol=tolerance)


def test_nothing_of_the_size_of_the_patches_is_allocated():
    """Beyond inputs and results the op holds [N, K, P] and [N, P]; what the torch backend holds is larger."""
    patches, texts = region_like(32, 49, 2, 512)
    with torch.profiler.profile(profile_memory=True) as profile:
        dk.group_patches(patches, texts, backend="cpp")
    allocated = sum(
        event.cpu_memory_usage
        for event in profile.events()
        if event.cpu_memory_usage > 0 and event.name == "aten::empty"
    )
    assert allocated <= 1.1 * 4 * (32 * 2 * 512 + 32 * 2 * 49 + 32 * 49), allocated


WITHOUT = """
import importlib.util, shutil
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "dreamlip_kernels._C" else find(name, *a)
{more}
import torch, dreamlip_kernels as dk
x, t = torch.randn(2, 9, 8), torch.randn(2, 3, 8)
print(dk.explain())
print("auto gives", dk.group_patches(x, t).shape)
try:
    dk.group_patches(x, t, backend="cpp")
    print("cpp runs")
except RuntimeError as error:
    print("cpp:", error)
"""


def test_without_a_compiler_it_says_so_and_torch_runs():
    printed = run(
        WITHOUT.format(more="which = shutil.which; shutil.which = lambda name: None if 'c++' in name else which(name)")
    )
    assert "no C++ compiler (c++) to build it with" in printed and "auto gives torch.Size([2, 3, 8])" in printed
    assert (
        "cpp: group_patches: backend='cpp' cannot run: no C++ compiler" in printed and "Use backend='auto'" in printed
    )


@pytest.mark.slow
def test_with_a_compiler_it_is_built_at_the_first_use(tmp_path):
    printed = run(WITHOUT.format(more=""), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert "not built; compiled at the first use" in printed and "cpp runs" in printed and list(tmp_path.rglob("*.so"))


def test_a_build_for_another_torch_is_not_used():
    change = "import torch; torch.__version__ = '2.99.0'"
    printed = run(
        change
        + "\nimport dreamlip_kernels as dk\nprint(dk.explain())"
        + "\nprint(dk.group_patches(torch.randn(1,4,8), torch.randn(1,2,8)).shape)"
    )
    assert (
        f"built against torch {torch.__version__.split('+')[0]}" in printed
        and "this is 2.99.0; install the package again" in printed
        and "torch.Size([1, 2, 8])" in printed
    )


def test_a_failing_compiler_is_reported_once_and_torch_runs(tmp_path):
    more = "import os; os.environ['CXX'] = 'false'"
    printed = run(WITHOUT.format(more=more), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert (
        "auto gives torch.Size([2, 3, 8])" in printed
        and "cpp: group_patches: backend='cpp' cannot run: compiling it failed" in printed
    )


@pytest.mark.parametrize("backend", ["cpp"])
def test_the_op_under_compile_with_and_without_gradients(backend):
    patches, texts = region_like(3, 9, 2, 8)
    fn = torch.compile(lambda x, t: dk.group_patches(x, t) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fn(patches, texts), 2 * dk.group_patches(patches, texts, backend=backend))


def test_the_op_itself_names_what_does_not_fit():
    forward = torch.ops.dreamlip_csrc.patch_pool_forward
    with pytest.raises(RuntimeError, match=r"must share N and D, got \[2, 9, 8\] and \[3, 2, 8\]"):
        forward(torch.randn(2, 9, 8), torch.randn(3, 2, 8), 0.5, 0, None)
    with pytest.raises(RuntimeError, match="must share a dtype"):
        forward(torch.randn(2, 9, 8), torch.randn(2, 2, 8).double(), 0.5, 0, None)
    with pytest.raises(RuntimeError, match="patch_mask must be bool"):
        forward(torch.randn(2, 9, 8), torch.randn(2, 2, 8), 0.5, 0, torch.ones(2, 9))
