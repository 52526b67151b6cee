"""Who may import whom, read from the source: the arrows of the architecture point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = {
    "reference": {"torch"},
    "checks": {"torch"},
    "dispatch": {"torch", ".extension"},
    "extension": {"torch"},
    "distributed": {"torch"},
    "tiles": {"torch"},
    "settings": {"torch"},
    "sigmoid": {"torch", ".checks", ".contrastive", ".distributed", ".tiles"},
    "paired_dot": {"torch", ".checks"},
    "logsumexp": {"torch", ".dispatch", ".checks", ".tiles", ".paired_dot", ".contrastive_triton"},
    "gathered_logsumexp": {"torch", ".distributed", ".logsumexp"},
    "contrastive": {"torch", ".dispatch", ".checks", ".distributed", ".gathered_logsumexp"},
    "contrastive_triton": {"torch", "triton", ".settings", ".paired_dot", ".contrastive_blocks", ".contrastive_kernels"},
    "contrastive_kernels": {"triton"},
    "contrastive_blocks": set(),
    "grouping_triton": {"torch", "triton"},
    "grouping": {"torch", ".grouping_triton", ".dispatch", ".checks", ".distributed", ".contrastive", ".logsumexp", ".reference"},
    "losses": {"torch", ".checks", ".sigmoid", ".contrastive", ".grouping", ".distributed"},
    "version": set(),
    "__init__": {".contrastive", ".logsumexp", ".dispatch", ".grouping", ".losses", ".settings", ".sigmoid", ".version"},
}
# Heavy dependencies of the trainer, each behind the files that wrap it.
TRAINER_ONLY_IN = {
    "deepspeed": {"engine", "checkpoint"},
    "open_clip": {"model", "class_prompts", "export", "hf_clip", "tokenizer"},
    "webdataset": {"data", "prepare", "shards"},
}


def imports(path: Path) -> set[str]:
    """Top-level packages, and relative modules with their dot, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {f".{node.module}"} if node.module else {f".{alias.name}" for alias in node.names}
    return found


def standard(name: str) -> bool:
    import sys

    return name in sys.stdlib_module_names or name == "__future__"


@pytest.mark.parametrize("path", sorted((ROOT / "dreamlip_kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_only_to_the_right(path):
    assert path.stem in KERNELS, f"{path.name} has no place in the layering; add it to the table"
    extra = {name for name in imports(path) if not standard(name)} - KERNELS[path.stem]
    assert not extra, f"{path.name} may not import {sorted(extra)}"


@pytest.mark.parametrize("path", sorted((ROOT / "dreamlip_train").glob("*.py")), ids=lambda p: p.stem)
def test_trainer_uses_public_names_and_wraps_heavy_dependencies(path):
    names = imports(path)
    for package, files in TRAINER_ONLY_IN.items():
        assert package not in names or path.stem in files, f"{package} belongs into {sorted(files)}, not {path.name}"
    for node in ast.walk(ast.parse(path.read_text())):
        modules = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for module in modules:
            public = not module.startswith("dreamlip_kernels.") or module == "dreamlip_kernels.backends.dispatch"
            assert public, f"{path.name} imports {module}: the trainer uses public names only"


@pytest.mark.parametrize("folder", ["dreamlip_kernels", "dreamlip_train"])
def test_a_file_holds_one_idea(folder):
    long = {p.name: n for p in (ROOT / folder).glob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"split these: {long}"
