"""K captions per image in a loop under accelerate, with sub-caption grouping.

python examples/accelerate_k_captions.py
accelerate launch --cpu --num_processes 2 examples/accelerate_k_captions.py
"""

import tempfile
from pathlib import Path

import open_clip
import tiny_clip
import tiny_world
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from dreamlip_kernels import DreamLIPLoss
from dreamlip_kernels.integrations.open_clip import SubCaptionTokenizer, accept_sub_captions


def main() -> None:
    """Train for thirty steps. Features are gathered over ranks by the loss; accelerate does the rest."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    name = tiny_clip.register(Path(tempfile.mkdtemp()))
    data = DataLoader(
        tiny_world.Pictures(16 * 31, SubCaptionTokenizer(open_clip.get_tokenizer(name), 3)), batch_size=16
    )
    model = accept_sub_captions(open_clip.create_model(name))  # 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    loss_fn = DreamLIPLoss()  # 2
    for step, batch in enumerate(data):
        loss = loss_fn(**model(*batch))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step % 10 == 0:
            accelerator.print(f"step {step:2d}   loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
