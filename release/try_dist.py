"""What lies in dist/ works where nothing else of the project is: ``python release/try_dist.py [dist]``.

The wheel of this Python and the source archive are each installed into a new environment; the compiled kernels must
load; `dreamlip-train` without its extra must name the extra; and the archive's own tests of the losses must pass.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CHECK = """
import dreamlip_kernels as dk, torch
from dreamlip_kernels.backends import extension
assert extension.why_not("cpu") is None, extension.why_not("cpu")
image, text = torch.randn(8, 16), torch.randn(8, 3, 16)
print(dk.__version__, float(dk.multi_positive_contrastive_loss(image, text, 10.0)))
"""


def environment(folder: Path) -> Path:
    """A new environment with torch and what building needs; its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install(
        python, "torch", "numpy<2.4", "ninja", "setuptools>=77", "wheel", "pytest", "pytest-timeout", "pytest-xdist"
    )
    return python


def install(python: Path, *words: str) -> None:
    """``pip install`` into an environment."""
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *words], check=True)


def main(dist: Path) -> None:
    """Try the wheel, then the archive."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels, archives = sorted(dist.glob(f"*{tag}-linux*.whl")), sorted(dist.glob("*.tar.gz"))
    if not wheels or not archives:
        sys.exit(f"try_dist: {dist} needs a wheel for {tag} and a source archive: make wheels-release")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "DREAMLIP_NO_CUDA": "1",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder, "env"))
        install(python, "--no-deps", str(wheels[-1]))
        subprocess.run([python, "-c", CHECK], check=True, cwd=folder, env=clean)
        bare = subprocess.run(
            [python.with_name("dreamlip-train"), "doctor"], cwd=folder, env=clean, capture_output=True, text=True
        )
        if "dreamlip[train]" not in bare.stderr or "Traceback" in bare.stderr:
            sys.exit(f"try_dist: dreamlip-train without its extra says:\n{bare.stderr[-2000:]}")
        with tarfile.open(archives[-1]) as archive:
            archive.extractall(folder, filter="data")
        source = Path(folder, archives[-1].name.removesuffix(".tar.gz"))
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", source], check=True, env=clean
        )
        for package in ("dreamlip_kernels", "dreamlip_train"):  # the tests shall find what is installed
            shutil.rmtree(source / package)
        pytest = [python, "-m", "pytest", "-q"]
        subprocess.run([*pytest, "--collect-only", "tests/kernels"], check=True, cwd=source, env=clean)
        names = ["test_extension.py", "test_losses.py", "test_reference.py", "grouping/test_group_patches.py"]
        subprocess.run([*pytest, *(f"tests/kernels/{name}" for name in names)], check=True, cwd=source, env=clean)
    print(f"{wheels[-1].name} and {archives[-1].name} work")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"))
