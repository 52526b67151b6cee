"""A small data set of real photographs: scikit-image's bundled pictures as JPEG files, with captions in DreamLIP's CSV
columns.
"""

import csv
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

# Raw and short captions, then the sentences of a long one; what each picture shows.
PHOTOS = {
    "astronaut.png": (
        "Eileen Collins portrait",
        "A smiling astronaut in an orange suit.",
        [
            "A woman with short brown hair smiles at the camera.",
            "She wears an orange space suit with patches.",
            "A model of a space shuttle stands behind her.",
            "An American flag hangs on the left.",
            "A white helmet is on her arm at the lower right.",
        ],
    ),
    "chelsea.png": (
        "Chelsea the cat",
        "A close-up of a tabby cat.",
        [
            "A tabby cat looks past the camera.",
            "Its fur is brown and orange with dark stripes.",
            "The eyes are green.",
            "Long white whiskers spread from its nose.",
        ],
    ),
    "coffee.png": (
        "espresso",
        "A cup of coffee on a saucer.",
        [
            "A white cup of espresso stands on a saucer.",
            "A metal spoon lies on the saucer's edge.",
            "The table is made of dark red wood.",
            "Golden foam covers the coffee.",
        ],
    ),
    "rocket.jpg": (
        "Falcon 9 launch pad",
        "A rocket on its launch pad at night.",
        [
            "A tall white rocket stands upright on a launch pad.",
            "Bright lights glow at its foot.",
            "A dark steel tower rises beside it.",
            "The evening sky behind is blue.",
        ],
    ),
    "hubble_deep_field.jpg": (
        "HDF",
        "Many galaxies in deep space.",
        [
            "Hundreds of galaxies shine on a black sky.",
            "Some are orange and some are blue.",
            "A spiral galaxy is near the middle.",
        ],
    ),
    "motorcycle_left.png": (
        "stereo pair, left",
        "A motorcycle in a garage.",
        [
            "A motorcycle stands in a workshop.",
            "Its front wheel points to the left.",
            "Tools and boxes fill the shelves behind it.",
            "The floor is gray concrete.",
        ],
    ),
    "color.png": (
        "color test image",
        "Colored shapes for testing.",
        ["Patches of bright color fill the picture.", "Some of them blend into each other."],
    ),
    "ihc.png": (
        "IHC stain",
        "A stained slice of tissue under a microscope.",
        [
            "Brown and blue stains color a slice of tissue.",
            "Small dark dots are cell nuclei.",
            "White gaps run between the cells.",
        ],
    ),
}


def write_photos(folder: Path, quality: int = 92) -> tuple[Path, Path]:
    """(captions.csv, images folder): one row and one JPEG file for each of PHOTOS that this scikit-image bundles."""
    images = folder / "images"
    images.mkdir(parents=True)
    rows = []
    for name, (raw, short, sentences) in PHOTOS.items():
        path = Path(skimage.__file__).parent / "data" / name
        if not path.exists():
            continue
        Image.fromarray(np.asarray(Image.open(path).convert("RGB"))).save(images / f"{path.stem}.jpg", quality=quality)
        row = {"Image Path": f"http://photos.example/{path.stem}.jpg", "raw_caption": raw}
        for speaker, order in (("IB", 1), ("SV", 1), ("LLA", -1)):
            row |= {f"short{speaker}_captions": short, f"long{speaker}_captions": " ".join(sentences[::order])}
        rows.append(row)
    assert len(rows) >= 4, "scikit-image bundles too few of these pictures"
    table = folder / "captions.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table, images
