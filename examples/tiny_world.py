"""Pictures of one colored square on a ground and captions of several sentences: small data for the examples."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220), "yellow": (235, 210, 50)}
GROUNDS = {"black": (10, 10, 10), "white": (245, 245, 245), "gray": (128, 128, 128)}
PLACES = {"left": (4, 12), "right": (20, 12), "top": (12, 4), "bottom": (12, 20)}


def picture(seed: int) -> tuple[Image.Image, str]:
    """A 32 x 32 picture and its caption of four sentences."""
    draw = random.Random(seed)
    color, ground, place = draw.choice([*COLORS]), draw.choice([*GROUNDS]), draw.choice([*PLACES])
    image = Image.new("RGB", (32, 32), GROUNDS[ground])
    x, y = PLACES[place]
    ImageDraw.Draw(image).rectangle((x, y, x + 8, y + 8), fill=COLORS[color])
    sentences = [f"A {color} square.", f"It is at the {place}.", f"The ground is {ground}.", f"{color} on {ground}."]
    return image, " ".join(sentences)


def write_csv(folder: Path, count: int, first: int = 0) -> Path:
    """``count`` pictures and a tab-separated table of their paths and captions, as open_clip reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["filepath\ttitle"]
    for seed in range(first, first + count):
        image, caption = picture(seed)
        image.save(folder / f"{seed}.png")
        rows.append(f"{folder / f'{seed}.png'}\t{caption}")
    table = folder / "captions.tsv"
    table.write_text("\n".join(rows) + "\n")
    return table


class Pictures(Dataset):
    """``count`` pictures [3, 32, 32] and what ``tokenizer`` makes of their captions, [K, L]."""

    def __init__(self, count: int, tokenizer: Callable[[str], torch.Tensor]):
        self.count, self.tokenizer = count, tokenizer

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, caption = picture(index)
        return pil_to_tensor(image) / 255 - 0.5, self.tokenizer(caption)[0]
