"""Who may import whom, read from the source of every file: the arrows between packages point one way."""

import ast
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package, or a file beside the packages: the packages and files it may import beside its own.
LAYERS = {
    "dreamlip_kernels": {
        "version": "",
        "options": "",
        "numerics": "",
        "checks": "numerics",
        "reference": "",
        "backends": "version",
        "ops": "backends checks numerics options",
        "distributed": "backends ops numerics",
        "targets": "ops checks distributed",
        "contrastive": "backends checks distributed numerics targets options",
        "sigmoid": "backends ops checks distributed targets options",
        "grouping": "backends ops checks distributed numerics options",
        "losses": "backends checks distributed targets contrastive sigmoid grouping options",
        "integrations": "contrastive losses",
        "qualification": "backends ops contrastive sigmoid grouping reference",
        "__init__": "version backends ops contrastive sigmoid grouping losses qualification",
        "__main__": "backends qualification",
    },
    "dreamlip_train": {
        "jobs": "",
        "config": "jobs",
        "captions": "jobs",
        "data": "jobs config captions",
        "model": "jobs config",
        "checkpoint": "jobs config data model",
        "prepare": "jobs config captions data model",
        "monitoring": "jobs",
        "evaluation": "jobs config captions data model",
        "reporting": "jobs config captions data checkpoint evaluation",
        "training": "jobs config data model monitoring checkpoint evaluation reporting",
        "ablation": "jobs config model checkpoint prepare evaluation reporting",
        "cli": "jobs config captions model monitoring checkpoint prepare evaluation reporting training ablation",
        "__init__": "",
        "__main__": "cli",
    },
}
# Heavy dependencies, each behind the packages that wrap it. dreamlip_kernels needs torch alone.
HEAVY = {
    "triton": "ops",
    "deepspeed": "training checkpoint",
    "open_clip": "model checkpoint evaluation",
    "webdataset": "data",
    "duckdb": "prepare",
    "matplotlib": "reporting ablation",
    "jinja2": "reporting",
    "ray": "jobs",
    "tyro": "cli",
}
FILES = [path for root in LAYERS for path in sorted((ROOT / root).rglob("*.py"))]
FOLDERS = (*LAYERS, "tests", "benchmarks", "docs", "examples", "release")
each_folder = pytest.mark.parametrize("folder", FOLDERS)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def place(path: Path) -> tuple[str, str]:
    """The distribution's top package and, in it, the package or file that ``path`` belongs to."""
    root, *inside = path.relative_to(ROOT).with_suffix("").parts
    return root, inside[0]


@cache
def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere in it, or of what it imports from a package's top."""
    names = set()
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = (
                [*here[: len(here) - node.level + 1], *filter(None, [node.module])]
                if node.level
                else node.module.split(".")
            )
            names |= {".".join([*base, alias.name]) for alias in node.names} if len(base) == 1 else {".".join(base)}
    return names


def offenders(paths: Iterable[Path], fault: Callable[[Path], str]) -> list[str]:
    """What is wrong with which file."""
    faults = [(path.relative_to(ROOT), fault(path)) for path in paths]
    return [f"{path}: {text}" for path, text in faults if text]


def test_imports_point_one_way():
    def fault(path):
        root, package = place(path)
        if package not in LAYERS[root]:
            return f"{package} has no place in the layering; add it to the table"
        allowed = {package, *LAYERS[root][package].split()}
        extra = {name for name in imports(path) if name.startswith(f"{root}.") and name.split(".")[1] not in allowed}
        return f"{package} may not import {sorted(extra)}" if extra else ""

    assert len(FILES) > 200 and not offenders(FILES, fault)


def test_heavy_dependencies_are_wrapped():
    def fault(path):
        root, package = place(path)
        tops = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        for name in tops & set(HEAVY):
            if package not in HEAVY[name].split():
                return f"{name} belongs into {HEAVY[name]}, not {package}"
        if root == "dreamlip_kernels":
            if not tops <= {root, "torch", "triton"}:
                return f"dreamlip_kernels needs torch alone, not {sorted(tops)}"
            if "triton" in tops and not path.stem.endswith(("_triton", "_kernels")):
                return "must run without triton"
        return ""

    assert not offenders(FILES, fault)


def test_the_trainer_uses_public_names_of_the_kernels():
    def fault(path):
        inner = {name for name in imports(path) if name.startswith("dreamlip_kernels.")}
        private = {name for name in inner if name.count(".") > 1 and name != "dreamlip_kernels.backends.dispatch"}
        modules = {name for name in inner if name.count(".") == 1 and name.split(".")[1] in LAYERS["dreamlip_kernels"]}
        names = sorted(private | modules)
        return f"imports {names}: the trainer uses public names only" if names else ""

    assert not offenders((path for path in FILES if place(path)[0] == "dreamlip_train"), fault)


@pytest.mark.parametrize("folder", ["kernels", "support/kernels", "support/ptx"])
def test_the_kernels_are_tested_without_the_trainer(folder):
    for path in (ROOT / "tests" / folder).rglob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] == "dreamlip_train"}, path.name


@each_folder
def test_a_folder_has_at_most_12_python_files(folder):
    """What has more gets rooms."""
    sizes = Counter(str(path.parent.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))
    assert not {name: count for name, count in sizes.items() if count > 12}


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function, its docstring apart."""
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    return node.end_lineno - node.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


@each_folder
def test_a_file_holds_one_idea_and_a_function_one_step(folder):
    """At most 300 lines and 60, docstrings apart; no formatting by hand."""
    for path in (ROOT / folder).rglob("*.py"):
        text, name = path.read_text(), path.relative_to(ROOT)
        assert len(text.splitlines()) <= 300, f"{name}: split it"
        assert not re.search(r"# fmt: (skip|off)", text) or path.samefile(__file__), f"{name}: rewrite what needs it"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert function_lines(node) <= 60, f"{name}: {node.name}: split it"


@pytest.mark.parametrize("folder", ["csrc", "tests/csrc", "tests/support/ptx/csrc"])
def test_a_source_of_csrc_holds_one_idea(folder):
    sources = [path for path in (ROOT / folder).iterdir() if path.suffix in (".cpp", ".cu", ".cuh", ".h")]
    assert sources and not [path.name for path in sources if len(path.read_text().splitlines()) > 300]
