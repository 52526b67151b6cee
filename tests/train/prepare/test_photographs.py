"""benchmarks/grouping/photographs.py: samples in the layout of ``prepare scenes``, whose masks are their sentences'."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dreamlip_train.captions.columns import caption_pool

PATH = Path(__file__).parents[3] / "benchmarks" / "grouping" / "photographs.py"


def test_each_sentence_of_a_photograph_has_its_region(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("photographs", PATH)
    photographs = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, photographs)  # where its dataclass looks for its module
    spec.loader.exec_module(photographs)
    photographs.main(photographs.Options(tmp_path, num_train=24, num_val=2))
    with (tmp_path / "train" / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and len(list((tmp_path / "val" / "images").iterdir())) == 2
    labels = {label for regions in photographs.REGIONS.values() for label in regions}
    for row in rows:
        sentences = [part.text for part in caption_pool(row, ["longIB_captions"])]
        mask = np.asarray(Image.open(tmp_path / "train" / "masks" / row["Image Path"].replace(".jpg", ".png")))
        values, pixels = np.unique(mask[mask > 0], return_counts=True)
        assert 2 <= len(sentences) <= 5 and values.tolist() == list(range(1, len(sentences) + 1))
        assert pixels.min() > 30, row
        assert all(any(label.casefold() in text.casefold() for label in labels) for text in sentences)
