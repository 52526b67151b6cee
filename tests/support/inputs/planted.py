"""Pictures of colored squares and a model that sees nothing but color: every right answer of an evaluation is known
in advance.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (40, 70, 220),
    "yellow": (230, 210, 40),
    "pink": (235, 120, 190),
    "teal": (20, 160, 160),
}
SIDE, GRID = 64, (8, 8)
PLACES = {"the upper left": (0, 0), "the upper right": (0, 32), "the lower left": (32, 0), "the lower right": (32, 32)}


def planted_sample(seed: int, objects: int = 3) -> dict:
    """A sample as held_out.val_samples yields it: `objects` squares of different colors on gray,
    one to a quarter of the picture.
    """
    rng = random.Random(seed)
    image = (torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 12 + 122).to(torch.uint8)
    mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    sentences = []
    places = rng.sample(sorted(PLACES), objects)
    for label, (color, place) in enumerate(zip(rng.sample(sorted(COLORS), objects), places, strict=True), start=1):
        top, left = (start + 8 for start in PLACES[place])
        image[:, top : top + 16, left : left + 16] = torch.tensor(COLORS[color], dtype=torch.uint8)[:, None, None]
        mask[top : top + 16, left : left + 16] = label
        sentences.append(f"A {color} square lies in {place} part of the picture.")
    return {"key": f"planted-{seed}", "image": image, "sentences": sentences, "raw": "some squares", "mask": mask}


class PlantedModel(nn.Module):
    """Patch and text features are colors relative to gray; an image's feature is the sum of its patches'.
    The interface is DreamLIP's.
    """

    image_size, grid = SIDE, GRID

    def __init__(self, mirrored: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.frozen = nn.Dropout(0.5).eval()
        self.mirrored = mirrored
        self.modes_seen: set[bool] = set()

    def tokenize(self, texts: list[str]) -> Tensor:
        return torch.tensor([[next(i for i, color in enumerate(COLORS) if color in text)] for text in texts])

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.modes_seen.add(self.training)
        color_nCHW = nn.functional.avg_pool2d(images.float() - 127.5, SIDE // GRID[0])
        if self.mirrored:
            color_nCHW = color_nCHW.flip(-1)
        patches_nPD = color_nCHW.flatten(2).transpose(1, 2) @ self.weight
        return nn.functional.normalize(patches_nPD.sum(dim=1), dim=-1), patches_nPD

    def encode_texts(self, tokens: Tensor) -> Tensor:
        colors = torch.tensor(list(COLORS.values()), dtype=torch.float32)
        return nn.functional.normalize(colors[tokens[:, 0]] - 127.5, dim=-1) @ self.weight
