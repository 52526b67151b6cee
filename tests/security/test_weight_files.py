"""Weight files of strangers: none of their code runs, and none of them fills the memory."""

import io
import json
import os
import pickle
import resource
import struct
import zipfile

import pytest
import torch

from dreamlip_train.checkpoint.files import refuse_foreign_pickles
from dreamlip_train.checkpoint.interoperability.import_weights import import_weights
from dreamlip_train.checkpoint.weights import load_for_eval
from dreamlip_train.jobs.user_error import RunError, UserError
from dreamlip_train.model.tensor_files import save_safetensors, save_tensors

MODEL = "ViT-B-32-quickgelu"
SMALLEST = "ViT-S-32-alt"


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(count: int, size: int, stride: int) -> bytes:
    """A pickled tensor [size] of strides [stride] in storage "0", which has ``count`` numbers."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    shape = b"(" + number(size) + b"t(" + number(stride) + b"t"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + shape + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def module(attributes: bytes) -> bytes:
    return b"c__torch__\nM\n)\x81}(" + attributes + b"ub"


def torchscript(path, pickled: bytes, storage: bytes = b"\0" * 4, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        archive.writestr("a/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("a/data/0", storage)
    return path


def nested(depth: int) -> bytes:
    inner = module(text("w") + tensor(1, 1, 1))
    for _ in range(depth):
        inner = module(text("m") + inner)
    return inner


TORCHSCRIPT = {
    "one number, 8 GB of shape": module(text("w") + tensor(1, 2 * 10**9, 0)),
    "one number, many times": module(b"".join(text(f"w{i}") + tensor(1, 5 * 10**8, 0) for i in range(16))),
    "a module that is part of itself": b"c__torch__\nM\n)\x81q\x00}(" + text("me") + b"h\x00ub",
    "modules in modules": nested(3000),
    "a remembered object of a large number": b"Nr" + struct.pack("<I", 2**31 - 1),
}


@pytest.fixture
def little_memory():
    """Nothing that the test does may take 1.5 GB more than this process has had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000


@pytest.mark.parametrize("kind", TORCHSCRIPT)
def test_a_torchscript_archive_is_no_larger_than_its_data(tmp_path, kind, little_memory):
    """Shapes without data, tables of the unpickler and endless modules took all memory or ended in a traceback."""
    path = torchscript(tmp_path / "x.pt", TORCHSCRIPT[kind])
    with pytest.raises(UserError, match="WEIGHTS: "):
        import_weights(path, tmp_path / "out.pt", MODEL)


def test_tensors_that_share_their_data_are_copied_a_few_times_only(tmp_path, little_memory):
    many = module(b"".join(text(f"w{i}") + tensor(2**24, 2**24, 1) for i in range(60)))
    path = torchscript(tmp_path / "x.pt", many, b"\1\2\3\4" * 2**24)
    with pytest.raises(UserError, match="its tensors are far more than its data"):
        import_weights(path, tmp_path / "out.pt", MODEL)


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """Files of kilobytes whose content is 256 MiB: a TorchScript archive, and torch's own format."""
    folder = tmp_path_factory.mktemp("bombs")
    zeros = b"\0" * 2**28
    torchscript(folder / "script.pt", module(text("w") + tensor(2**26, 2**26, 1)), zeros, zipfile.ZIP_DEFLATED)
    saved = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(2)}}, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(folder / "torch.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, zeros if name.endswith("data/0") else old.read(name))
    return folder


def readers(folder, model=MODEL):
    """What reads a weights file: ``import`` and every ``eval``."""
    yield lambda path: import_weights(path, folder / "out.pt", model)
    yield lambda path: load_for_eval(path, model)


@pytest.mark.parametrize("name", ["script.pt", "torch.pt"])
def test_a_zip_bomb_is_not_unpacked(bombs, tmp_path, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in readers(tmp_path):
        with pytest.raises(UserError, match="a bomb, no weights"):
            read(bombs / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


STRANGE = {
    "a shape without numbers": {"w": torch.zeros(1).half().expand(10**10)},
    "sparse": {"w": torch.eye(2).to_sparse()},
    "on no device": {"w": torch.empty(3, device="meta")},
    "complex": {"w": torch.zeros(3, dtype=torch.complex64)},
    "quantized": {"w": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)},
    "names that are numbers": {1: torch.zeros(3)},
    "no tensors": {"w": 1},
    "nothing": {},
}


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("kind", STRANGE)
def test_other_things_than_dense_tensors_are_named(tmp_path, kind, wrapped):
    torch.save({"state_dict": STRANGE[kind]} if wrapped else STRANGE[kind], tmp_path / "x.pt")
    for read in readers(tmp_path, SMALLEST):
        with pytest.raises(UserError, match=r"x.pt"):
            read(tmp_path / "x.pt")


def test_headers_of_safetensors_that_lie_are_messages(tmp_path):
    def file(name: str, header: bytes, length: int | None = None):
        size = len(header) if length is None else length
        (tmp_path / name).write_bytes(struct.pack("<Q", size) + header + b"\0" * 16)
        return tmp_path / name

    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    lies = [{"shape": [10**12]}, {"data_offsets": [0, 10**12]}, {"data_offsets": [16, 0]}, {"dtype": "XX"}]
    paths = [file(f"{i}.safetensors", json.dumps({"w": one | lie}).encode()) for i, lie in enumerate(lies)]
    paths += [file("a.safetensors", b"[" * 10**5), file("b.safetensors", b"{}", 2**62), file("c.safetensors", b"")]
    whole = file("d.safetensors", json.dumps({"w": one}).encode()).read_bytes()
    for cut in (0, 7, 8, 40, len(whole) - 1):
        paths.append(tmp_path / f"cut{cut}.safetensors")
        paths[-1].write_bytes(whole[:cut])
    for path in paths:
        with pytest.raises(UserError, match=path.name):
            import_weights(path, tmp_path / "out.pt", MODEL)


@pytest.mark.parametrize("save", [save_tensors, save_safetensors])
def test_a_full_disk_is_said_whatever_the_library_makes_of_it(save, tmp_path):
    """torch raises a RuntimeError for it, and safetensors an error of its own: `export` ended with a traceback."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(RunError, match=r"--output: .*x.pt' can't be written: .* GB free.; make room"):
            save({"w": torch.zeros(100_000)}, tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


class Runs:
    def __reduce__(self):
        return os.mkdir, (RAN,)


RAN = "ran-by-a-pickle"


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "ema.pt", "below/other.pt"])
def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path, monkeypatch, name):
    """DeepSpeed loads every .pt of a checkpoint as a full pickle."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-00000002" / name
    path.parent.mkdir(parents=True)
    torch.save({"module": {}, "more": Runs()}, path)
    with pytest.raises(UserError, match="would call (posix|nt).mkdir when loaded"):
        refuse_foreign_pickles(tmp_path / "step-00000002")
    path.write_bytes(pickle.dumps(Runs()))
    with pytest.raises(UserError):
        refuse_foreign_pickles(tmp_path / "step-00000002")
    assert not (tmp_path / RAN).exists()
