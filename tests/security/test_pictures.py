"""Pictures are opened in one place, by an allow-list of formats: no decoder that runs another program is ever asked."""

import ast
import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from class_sets import write_class_shard
from PIL import Image
from tiny import tiny_model

import dreamlip_train
from dreamlip_train.data.images import FORMATS, ImageError, decode_image, decode_labels, media_type
from dreamlip_train.evaluation.classification.zero_shot import evaluate_zero_shot
from dreamlip_train.model.build import build_model

PACKAGE = Path(dreamlip_train.__file__).parent
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 4 4
%%EndComments
(ran) (w) file closefile
showpage
%%EOF
"""


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A gs on PATH that says when it is called."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return tmp_path / "ran"


@pytest.mark.parametrize("read", [decode_image, decode_labels, media_type])
def test_postscript_inside_a_png_is_not_run(read, ghostscript):
    """Pillow goes by content, tries its 43 formats, and runs Ghostscript for one of them."""
    with pytest.raises(ImageError):
        read(EPS)
    assert not ghostscript.exists()
    with pytest.raises(OSError):  # the probe is a true one
        Image.open(io.BytesIO(EPS)).load()
    assert ghostscript.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_postscript_in_another_packages_data_set_is_not_run(workers, tmp_path, ghostscript):
    """clip_benchmark opens its webdataset folders' pictures with Pillow itself."""
    pytest.importorskip("clip_benchmark", reason="the benchmark extra is not installed")
    write_class_shard(tmp_path / "made", ["dog", "cat"], 3, picture=lambda i: EPS)
    model = build_model(tiny_model(), 0)
    root = str(tmp_path / "{dataset}")
    found = evaluate_zero_shot(model, ["wds/made"], root, "cpu", workers=workers)
    assert "cannot identify image file" in found["wds/made"]["error"]
    assert not ghostscript.exists() and "EPS" in Image.ID


@pytest.mark.parametrize("format", ["TIFF", "ICO", "PPM", "TGA", "PCX", "ICNS", "DDS", "SGI", "MSP", "IM", "SPIDER"])
def test_other_formats_are_refused(format):
    file = io.BytesIO()
    Image.new({"MSP": "1", "SPIDER": "F"}.get(format, "RGB"), (32, 32)).save(file, format)
    with pytest.raises(ImageError):
        decode_image(file.getvalue())


@pytest.mark.parametrize("format", FORMATS)
def test_allowed_formats_are_read(format):
    file = io.BytesIO()
    Image.new("RGB", (32, 16)).save(file, format)
    assert decode_image(file.getvalue()).shape == (3, 16, 32)


@pytest.mark.parametrize("read", [decode_image, decode_labels])
def test_pixels_are_limited_before_they_are_decoded(read):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0)
    bomb = zlib.compress(b"\0" * 12_001 * 12_000, 9)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", bomb) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="12000 x 12000 pixels are more than 100,000,000"):
        read(data)


def test_one_place_opens_pictures():
    """Every other ``Image.open`` would have all formats."""
    calls = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open", "read_image")
    ]
    assert calls == ["data/images.py"]
