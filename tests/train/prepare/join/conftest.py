"""Image shards for the tests of ``prepare join``."""

import json
from pathlib import Path

import pytest
from caption_tables import url
from shard_files import jpeg, write_tar


@pytest.fixture
def shards(tmp_path) -> Path:
    """3 shards of 10 samples as img2dataset makes them; sample i has url i, and a key of its own."""
    for shard in range(3):
        members = []
        for i in range(10 * shard, 10 * shard + 10):
            record = {"url": url(i), "width": 40, "caption": None, "key": f"{i:09d}", "number": f"n{i}"}
            members += [(f"{i:09d}.jpg", jpeg(i)), (f"{i:09d}.json", json.dumps(record).encode())]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", members)
    return tmp_path / "in"
