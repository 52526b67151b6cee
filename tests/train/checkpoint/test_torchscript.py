"""TorchScript archives are read for their tensors; nothing in them runs."""

import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from dreamlip_train.checkpoint.interoperability.torchscript import is_torchscript, read_torchscript
from dreamlip_train.jobs.user_error import UserError


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.half_precision = nn.Parameter(torch.randn(5, 2).half().T)  # not contiguous
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, x):
        return self.inner(x) * self.scale


SAVE = """
import runpy, sys, torch
module = torch.jit.script(runpy.run_path(sys.argv[1])["Tower"]())
module.save(sys.argv[2])
torch.save(dict(module.state_dict()), sys.argv[3])
"""


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A scripted Tower's archive and its tensors, from a process of its own: torch's compiler keeps state here."""
    folder = tmp_path_factory.mktemp("tower")
    archive, tensors = folder / "x.pt", folder / "tensors.pt"
    subprocess.run([sys.executable, "-c", SAVE, __file__, str(archive), str(tensors)], check=True)
    return archive, torch.load(tensors, weights_only=True)


def test_it_gives_what_torch_gives(tower):
    archive, expected = tower
    assert is_torchscript(archive)
    tensors = read_torchscript(archive)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value), name


class Writes(nn.Module):
    """Writes a file when torch.jit.load restores it."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.zeros(2))
        self.training = False

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path, self.weight, self.training = state[0], state[1], state[2]
        torch.save(self.weight, self.path)

    def forward(self, x: torch.Tensor):
        return x


def test_a_modules_own_code_is_not_run(tmp_path):
    """torch.jit.load ran a module's __setstate__, which wrote a file."""
    path = tmp_path / "evil.pt"
    torch.jit.script(Writes(str(tmp_path / "written"))).save(path)
    with pytest.raises(UserError, match="only its own code could restore.*torch.jit.load where you trust it"):
        read_torchscript(path)
    assert not (tmp_path / "written").exists()


def repacked(source, target, change):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)


CALLS = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, content: CALLS if name.endswith("data.pkl") else content, "would call os.system when loaded"),
        (
            lambda name, content: content[:-30] if name.endswith("data.pkl") else content,
            "can't be read as a TorchScript",
        ),
        (lambda name, content: content[:3] if "/data/" in name else content, "cut short"),
        (lambda name, content: None if "/data/" in name else content, "can't be read as a TorchScript"),
        (lambda name, content: None if name.endswith("data.pkl") else content, "can't be read as a TorchScript"),
        (lambda name, content: b"\x80\x02}." if name.endswith("data.pkl") else content, "holds a dict, not a module"),
    ],
)
def test_damaged_archives_are_named(tower, tmp_path, change, message):
    repacked(tower[0], tmp_path / "y.pt", change)
    with pytest.raises(UserError, match=f"WEIGHTS: .*y.pt.*{message}"):
        read_torchscript(tmp_path / "y.pt")
