"""Shards to caption, and a small model of transformers."""

import json
from pathlib import Path

import pytest
from chat_server import PER_SHARD
from shard_files import jpeg, write_tar
from tiny_llava import save_tiny_llava

from dreamlip_train.prepare.recaption import endpoint


@pytest.fixture
def shards(tmp_path) -> Path:
    for shard in range(3):
        members = []
        for i in range(PER_SHARD * shard, PER_SHARD * (shard + 1)):
            members += [
                (f"{i:04d}.jpg", jpeg(i)),
                (f"{i:04d}.json", json.dumps({"raw_caption": f"raw {i}", "url": f"u{i}"}).encode()),
            ]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", members)
    return tmp_path / "in"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return str(save_tiny_llava(tmp_path_factory.mktemp("llava")))
