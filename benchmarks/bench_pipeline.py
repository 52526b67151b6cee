"""The input pipeline alone: photographs at a short side of 256 px with 8 of 10 sentences each, from tar shards to
batches, two loader processes.

pytest benchmarks/bench_pipeline.py --benchmark-only

today   what open_clip's training does to a sample: PIL, torchvision's float transforms and normalization,
        SimpleTokenizer
ours    dreamlip_train's loader: strict JPEG decoding, bicubic crops of uint8 pixels, CaptionTokenizer, exact resume
"""

import io
import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

K, SENTENCES, SIDE, BATCH, WORKERS = 8, 10, 256, 64, 2
BATCHES_A_ROUND, ROUNDS = 15, 5
PICTURES, SHARDS, A_SHARD = 400, 20, 520
WORDS = (
    "a the red green small large dog cat tree on in at near behind with sunny street water people standing sitting "
    "white black old wooden table window "
    "bright sky cloud building bicycle umbrella kitchen mountain grass holding wearing striped shirt left right "
    "corner foreground background its several"
).split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards, read once so that no disk is measured."""
    for package in ("webdataset", "simplejpeg", "open_clip", "skimage"):
        pytest.importorskip(package, reason=f"{package} is not installed: the train and dev extras have it")
    from dreamlip_train.data.shards.shard_writer import ShardWriter

    folder, rng = tmp_path_factory.mktemp("pipeline"), random.Random(0)
    pictures = list(itertools.islice(_photographs(rng), PICTURES))
    for shard in range(SHARDS):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for i in range(A_SHARD):
                sentences = [
                    " ".join(rng.choices(WORDS, k=rng.randint(12, 32))).capitalize() + "." for _ in range(SENTENCES)
                ]
                record = {"raw_caption": "a photograph", "longSV_captions": " ".join(sentences)}
                writer.add(
                    {"key": f"{shard:05d}{i:04d}", "jpg": rng.choice(pictures), "json": json.dumps(record).encode()}
                )
    index = {f"{shard:05d}.tar": {"samples": A_SHARD, "bytes": 0} for shard in range(SHARDS)}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "samples": SHARDS * A_SHARD, "shards": index}))
    return folder


def _photographs(rng):
    """JPEG files (quality 95) of random windows of scikit-image's bundled photographs."""
    import skimage
    from PIL import Image

    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")
    paths = [path for name in names if (path := Path(skimage.__file__).parent / "data" / name).exists()]
    sources = [Image.fromarray(np.asarray(Image.open(path).convert("RGB"))) for path in paths]
    while True:
        source = rng.choice(sources)
        width = rng.uniform(0.5, 1.0) * min(source.width, source.height * 4 / 3)
        left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - width * 3 / 4)
        window = source.resize(
            (SIDE * 4 // 3, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + width * 3 / 4)
        )
        file = io.BytesIO()
        window.save(file, "JPEG", quality=95)
        yield file.getvalue()


def ours(folder):
    """dreamlip_train's batches."""
    from dreamlip_train.config.schema import DataConfig
    from dreamlip_train.data.loader import train_loader
    from dreamlip_train.model.tokenizer import CaptionTokenizer

    config = DataConfig(shards=str(folder), num_sub_captions=K, num_workers=WORKERS)
    return train_loader(config, image_size=224, tokenize=CaptionTokenizer(77).with_cut, batch_size=BATCH).epoch(0)


class Today(IterableDataset):
    """Batches as open_clip's transforms and tokenizer make them."""

    def __init__(self, folder):
        self.paths = sorted(folder.glob("*.tar"))

    def __iter__(self):
        import open_clip
        from PIL import Image
        from webdataset.tariterators import tarfile_samples

        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info().id
        transform, tokenizer = (
            open_clip.image_transform(224, is_train=True),
            open_clip.SimpleTokenizer(context_length=77),
        )
        images, texts = [], []
        os.environ.pop("WDS_SECURE", None)  # it refuses local files
        for sample in tarfile_samples([{"url": str(path)} for path in self.paths[worker::WORKERS]]):
            images.append(transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")))
            sentences = json.loads(sample["json"])["longSV_captions"].split(".")[:SENTENCES]
            texts.append(tokenizer(random.sample(sentences, K)))
            if len(images) == BATCH:
                yield torch.stack(images), torch.stack(texts)
                images, texts = [], []


def today(folder):
    """open_clip's batches."""
    return iter(DataLoader(Today(folder), batch_size=None, num_workers=WORKERS, prefetch_factor=4))


@pytest.mark.parametrize("loader", [today, ours])
def test_input_pipeline(run, shards, loader):
    batches = loader(shards)
    for _ in range(8):
        next(batches)

    def step():
        for _ in range(BATCHES_A_ROUND):
            next(batches)

    run(step, rounds=ROUNDS, images=BATCHES_A_ROUND * BATCH)
