"""K captions per image in a LightningModule, with sub-caption grouping.

python examples/lightning_k_captions.py
"""

import tempfile
from pathlib import Path

import lightning
import open_clip
import tiny_clip
import tiny_world
import torch
from torch.utils.data import DataLoader

from dreamlip_kernels import DreamLIPLoss
from dreamlip_kernels.integrations.open_clip import SubCaptionTokenizer, accept_sub_captions


class Clip(lightning.LightningModule):
    """A CLIP, its loss, its optimizer."""

    def __init__(self, name: str):
        super().__init__()
        self.clip = accept_sub_captions(open_clip.create_model(name))  # 1
        self.loss = DreamLIPLoss()  # 2

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = self.loss(**self.clip(*batch))
        if self.global_step % 10 == 0 and self.trainer.is_global_zero:
            print(f"step {self.global_step:2d}   loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Train for thirty steps; ``devices`` and ``strategy="ddp"`` need no change to the loss."""
    torch.manual_seed(0)
    name = tiny_clip.register(Path(tempfile.mkdtemp()))
    data = tiny_world.Pictures(16 * 31, SubCaptionTokenizer(open_clip.get_tokenizer(name), 3))
    trainer = lightning.Trainer(
        max_steps=31, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Clip(name), DataLoader(data, batch_size=16))


if __name__ == "__main__":
    main()
