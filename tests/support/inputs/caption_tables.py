"""Caption tables and what comes of them: sample i has a url, captions and a place of its own."""

import csv
import hashlib
from pathlib import Path

from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN

COLUMNS = ["raw_caption", "shortSV_captions", "longSV_captions"]


def url(i):
    return f"http://images.example.com/set%20one/{i:04d}.jpg"


def caption(i):
    return f"Long {i}. It has two sentences."


def write_csv(path, rows, header=(IMAGE_COLUMN, *COLUMNS), **options):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, **options)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def rows(numbers):
    return [(url(i), f"raw {i}", f"short {i}", caption(i)) for i in numbers]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("*.tar")}
