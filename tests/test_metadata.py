"""What an index page and an installer are told is so: every import is declared, every link of README.md leads there."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Imports whose distribution has another name, and what comes with torch.
DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open_clip_torch", "clip_benchmark": "clip-benchmark", "triton": "torch"}


def declared(*extras: str) -> set[str]:
    """The distributions that an install with these extras brings."""
    words = list(PROJECT["dependencies"])
    for extra in extras:
        words += PROJECT["optional-dependencies"][extra]
    return {re.match(r"[\w.-]+", word)[0].lower() for word in words}


def imported(package: str) -> set[str]:
    """The distributions that a package imports, anywhere in it."""
    names = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
    tops = (
        {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"dreamlip_kernels", "dreamlip_train"}
    )
    return {DISTRIBUTIONS.get(top, top).lower() for top in tops}


def test_the_kernels_need_torch_alone():
    assert imported("dreamlip_kernels") == declared() == {"torch"}


def test_the_trainer_declares_what_it_imports():
    """safetensors and braceexpand once came only because something else needed them."""
    trainer = declared("train", "log", "wandb", "recaption", "ray", "hub", "benchmark")
    assert imported("dreamlip_train") <= trainer, imported("dreamlip_train") - trainer
    assert "requests" in declared("benchmark"), "clip_benchmark imports it and does not say so"
    unused = {name for name in declared("train")} - imported("dreamlip_train")
    assert not unused, f"declared, and never imported: {unused}"


def setup_module(monkeypatch, **environment) -> dict:
    """The functions of setup.py, as they are under these variables; nothing is set up."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    source = (ROOT / "setup.py").read_text().split("\nsetup(\n")[0]
    names: dict = {"__file__": str(ROOT / "setup.py")}
    exec(compile(source, "setup.py", "exec"), names)
    return names


@pytest.mark.parametrize("end", ["", "/"])
def test_an_index_page_has_absolute_links(monkeypatch, end):
    home = "https://github.com/lab/dreamlip/blob/v1.0"
    names = setup_module(monkeypatch, DREAMLIP_REPOSITORY=home + end, DREAMLIP_LOCAL_VERSION="cuda")
    assert names["version"]().endswith("+cuda")
    text = names["readme"]()
    links = re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)", text)
    assert len(links) > 30
    for picture, link in links:
        assert re.match("https?://|#", link), link
        own = link.removeprefix(home.replace("/blob/", "/raw/") if picture else home)
        if own != link:
            assert (ROOT / own.lstrip("/").split("#")[0]).exists(), link
    assert names["urls"]()["Source"] == "https://github.com/lab/dreamlip"


def test_an_editable_install_is_visible_to_type_checkers(monkeypatch):
    """It was a finder that Python runs at its start, and editors knew nothing of the package."""
    names = setup_module(monkeypatch)
    assert names["layout"]()["package_dir"] == {"dreamlip_kernels.csrc": "csrc"}
    monkeypatch.setattr(sys, "argv", ["setup.py", "editable_wheel"])
    assert names["layout"]()["package_dir"] == {"": "."}  # the layout that setuptools writes as a .pth file


def test_a_plain_build_keeps_the_links_of_the_repository(monkeypatch):
    monkeypatch.delenv("DREAMLIP_REPOSITORY", raising=False)
    names = setup_module(monkeypatch)
    assert names["readme"]() == (ROOT / "README.md").read_text(encoding="utf-8") and list(names["urls"]()) == ["Paper"]
