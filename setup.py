"""Builds csrc/ where torch and a compiler are at hand.

Without them the packages install as pure Python and say what they lack. DREAMLIP_NO_CUDA=1 leaves the CUDA sources out,
DREAMLIP_NO_EXTENSION=1 all of csrc/.
TORCH_CUDA_ARCH_LIST chooses the architectures; no GPU is needed to build. For a release, DREAMLIP_LOCAL_VERSION=cuda
makes 0.1.0+cuda of 0.1.0, and DREAMLIP_REPOSITORY, such as https://github.com/OWNER/NAME/blob/v0.1.0, is what the
links of an index page begin with.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

# PTX of compute_90 also runs on later GPUs; nothing here needs the features of sm_90a alone.
ARCHITECTURES = "8.0;9.0+PTX"


def version() -> str:
    """The version of dreamlip_kernels, with the local part of a build of its own."""
    text = Path(__file__).with_name("dreamlip_kernels").joinpath("version.py").read_text()
    local = os.environ.get("DREAMLIP_LOCAL_VERSION")
    return re.search(r'__version__ = "(.*)"', text)[1] + (f"+{local}" if local else "")


def readme() -> str:
    """README.md for an index page, where relative links lead nowhere and pictures are files, not pages about them."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    home = os.environ.get("DREAMLIP_REPOSITORY", "").rstrip("/")
    if not home:
        return text
    text = re.sub(r"(!\[[^]]*\]\()(?![a-z]+:|#)", rf"\g<1>{home.replace('/blob/', '/raw/')}/", text)
    return re.sub(r"\]\((?![a-z]+:|#)", f"]({home}/", text)


def urls() -> dict[str, str]:
    """The project's links: its paper and, of a release, its source and changes."""
    links = {"Paper": "https://arxiv.org/abs/2403.17007"}
    if home := os.environ.get("DREAMLIP_REPOSITORY", "").rstrip("/"):
        links |= {"Source": home.split("/blob/")[0], "Changelog": f"{home}/CHANGELOG.md"}
    return links


def tell(message: str) -> None:
    print(f"dreamlip: {message}", file=sys.stderr)


def extension() -> dict:
    """setup()'s arguments for the compiled kernels, or none with the reason told."""
    if os.environ.get("DREAMLIP_NO_EXTENSION") == "1":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        tell(
            "torch is not importable here (build isolation), so nothing is compiled now; "
            "the C++ kernels are compiled at their first use"
        )
        return {}
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        tell(f"no C++ compiler ({compiler}), so nothing is compiled; the torch and triton backends need none")
        return {}
    sources, macros, flags = ["csrc/ops.cpp", "csrc/patch_pool_cpu.cpp"], [], {"cxx": ["-O3", "-g0", "-Wno-psabi"]}
    kind = cpp_extension.CppExtension
    nvcc = cpp_extension.CUDA_HOME and shutil.which(str(Path(cpp_extension.CUDA_HOME, "bin", "nvcc")))
    if os.environ.get("DREAMLIP_NO_CUDA") == "1" or not torch.version.cuda or not nvcc:
        tell("building the CPU kernels only" + ("" if torch.version.cuda else " (torch has no CUDA)"))
    else:
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        sources += ["csrc/patch_pool.cu", "csrc/logsumexp.cu"]
        macros = [("DREAMLIP_CUDA", f'"{torch.version.cuda}"'), ("DREAMLIP_CUDA_ARCHITECTURES", f'"{architectures}"')]
        flags["nvcc"] = ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]
        kind = cpp_extension.CUDAExtension
        tell(f"building the CPU and CUDA kernels for {architectures} with {nvcc}")

    class BuildOrGoOn(cpp_extension.BuildExtension):
        """A failed build must not keep anyone from the torch and triton backends."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # what lies in build/ may be of another torch, which no date tells

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if os.environ.get("DREAMLIP_REQUIRE_EXTENSION") == "1":
                    raise
                tell(f"THE COMPILED KERNELS WERE NOT BUILT: {error}")
                self.extensions = []

    headers = sorted(
        f"csrc/{path.name}" for path in Path(__file__).with_name("csrc").iterdir() if path.suffix in (".h", ".cuh")
    )
    module = kind("dreamlip_kernels._C", sources, depends=headers, define_macros=macros, extra_compile_args=flags)
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildOrGoOn.with_options(use_ninja=shutil.which("ninja") is not None)},
    }


def layout() -> dict:
    """The packages and their folders. An editable install finds csrc/ beside them, and is then a line of a .pth file,
    which type checkers and editors read; with a folder of another name it would be code that only Python runs.
    """
    # Folders of data are packages too to setuptools, which warns of those that are not listed.
    packages = find_namespace_packages(include=["dreamlip_kernels*", "dreamlip_train*"], exclude=["*.__pycache__"])
    if "editable_wheel" in sys.argv:
        return {"packages": packages, "package_dir": {"": "."}}
    return {"packages": [*packages, "dreamlip_kernels.csrc"], "package_dir": {"dreamlip_kernels.csrc": "csrc"}}


setup(
    version=version(),
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=urls(),
    package_data={
        "dreamlip_kernels": ["py.typed"],
        "dreamlip_kernels.backends": ["measured/*.json"],
        "dreamlip_train.evaluation": ["paper_tables/*", "segmentation/class_names/*", "compositional/*.txt"],
        "dreamlip_train.reporting": ["explore_page/*", "run_page/*"],
        "dreamlip_kernels.csrc": ["*.h", "*.cpp", "*.cu", "*.cuh"],
    },
    **layout(),
    **extension(),
)
