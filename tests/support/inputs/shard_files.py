"""Shards for tests: tars of small pictures with captions, whole or broken in a chosen way, and their loader."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.loader import train_loader
from dreamlip_train.data.shards.shards import read_shard


def jpeg(seed: int, size: int = 40) -> bytes:
    array = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).resize((size, size)).save(file, "JPEG", quality=90)
    return file.getvalue()


def record(key: str, sentences: int = 4) -> dict:
    return {
        "raw_caption": f"raw {key}",
        "longSV_captions": " ".join(f"Sentence {j} of {key}." for j in range(sentences)),
    }


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, seed: int = 0, **captions) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", jpeg(seed)), (f"{key}.json", json.dumps(captions or record(key)).encode())]


def write_shards(folder: Path, counts: list[int], index: bool = True) -> Path:
    """NNNNN.tar of the given sample counts, keys unique over all of them, with a manifest.json unless ``index`` is
    False.
    """
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            members += sample(f"{number:06d}", number)
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
    if index:
        write_index(folder, counts)
    return folder


def write_index(folder: Path, counts: list[int]) -> None:
    shards = {f"{i:05d}.tar": {"samples": c, "bytes": 0} for i, c in enumerate(counts)}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "samples": sum(counts), "shards": shards}))


def tokenize(texts: list[str]) -> tuple[torch.Tensor, int]:
    """The last 12 characters as numbers: enough to tell captions apart; and how many texts have more."""
    return torch.tensor([[min(ord(c), 126) for c in text[-12:].ljust(12)] for text in texts]), sum(
        len(text) > 12 for text in texts
    )


def records(folder) -> dict[str, dict]:
    """The json of every sample of a folder's shards, by key."""
    return {
        sample["key"]: json.loads(sample["json"])
        for shard in sorted(Path(folder).glob("*.tar"))
        for sample in read_shard(str(shard))
    }


def loader(folder, *, workers=0, batch_size=8, rank=0, world_size=1, seed=0, quarantine=None, **data):
    config = DataConfig(shards=str(folder), num_workers=workers, num_sub_captions=3, shuffle_buffer=20, **data)
    return train_loader(
        config,
        image_size=16,
        tokenize=tokenize,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        quarantine=quarantine,
    )


def keys(batches):
    return [key for batch in batches for key in batch["keys"]]


def same(a, b):
    return a["keys"] == b["keys"] and all(torch.equal(a[name], b[name]) for name in ("images", "text", "text_mask"))
