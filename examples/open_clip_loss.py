"""Quick start for a loop of one's own: open_clip's ClipLoss swapped for one that takes many captions per image.

python examples/open_clip_loss.py
"""

import torch

from dreamlip_kernels import MultiPositiveContrastiveLoss

torch.manual_seed(0)
N, K, D = 32, 4, 64
towers = torch.nn.ModuleList([torch.nn.Linear(128, D), torch.nn.Linear(96, D)])
logit_scale = torch.nn.Parameter(torch.tensor(2.66))
optimizer = torch.optim.AdamW([*towers.parameters(), logit_scale], lr=1e-2)
loss_fn = MultiPositiveContrastiveLoss()  # was: open_clip.ClipLoss()

images, captions = torch.randn(N, 128), torch.randn(N, K, 96)
text_mask = torch.rand(N, K) > 0.2  # an image may have fewer than K captions
text_mask[:, 0] = True

for step in range(30):
    image_features = torch.nn.functional.normalize(towers[0](images), dim=-1)  # [N, D]
    text_features = torch.nn.functional.normalize(towers[1](captions), dim=-1)  # [N, K, D]; [N, D] works as before
    loss = loss_fn(image_features, text_features, logit_scale.exp(), text_mask=text_mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == 29:
        print(f"step {step:2d}   loss {loss.item():.3f}")
