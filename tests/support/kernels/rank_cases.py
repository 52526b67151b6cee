"""A batch that 2, 3 and 4 ranks can share, and every loss with every option over it."""

import torch
import torch.distributed as dist
from numerics import clip_like

from dreamlip_kernels import reference

N, K, P, D = 12, 3, 9, 8  # N divides by 2, 3 and 4


def global_case():
    image, text = clip_like(N, K, D, torch.float64)
    patches = torch.randn(N, P, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[0], mask[5:8] = False, False  # an image without captions; with W = 4, a third of a rank's
    return image, text, patches, mask


MODES = (("slot", "mean"), ("all", "mean"), ("all", "logsum"))
SCOPES = (("image", "both"), ("image", "t2v"), ("batch", "both"), ("batch", "t2v"))
CASES = [dict(loss="contrastive", negatives=n, positives=p, masked=m) for n, p in MODES for m in (False, True)]
CASES += [dict(loss="sigmoid", masked=m) for m in (False, True)]
CASES += [dict(loss="contrastive", negatives=n, positives=p, masked=True, images=True) for n, p in MODES]
CASES += [dict(loss="sigmoid", masked=False, images=True)]
TARGETS = [
    dict(same_image="ignore"),
    dict(same_image="positive", label_smoothing=0.1),
    dict(same_image="ignore", label_smoothing=0.2),
]
CASES += [dict(loss="contrastive", masked=False, label_smoothing=0.1), dict(loss="sigmoid", masked=True, **TARGETS[1])]
CASES += [dict(loss="contrastive", negatives=n, masked=True, **t) for n in ("slot", "all") for t in TARGETS]
CASES += [dict(loss="sigmoid", masked=True, images=True, **TARGETS[2])]
CASES += [dict(loss="grouping", contrast=c, direction=d, masked=m) for c, d in SCOPES for m in (False, True)]
CASES += [dict(loss="grouping", contrast="conditioned", candidates=3, masked=True, images=m) for m in (False, True)]
CASES += [dict(loss="contrastive", negatives=n, positives=p, masked=True, reduction="sum") for n, p in MODES[1:]]
CASES += [dict(loss="sigmoid", masked=True, reduction="sum"), dict(loss="grouping", masked=True, reduction="sum")]
CASES += [dict(loss=loss, masked=True, reduction="none") for loss in ("contrastive", "sigmoid", "grouping")]
CASES += [dict(loss="sigmoid", masked=True, reduction="none", **TARGETS[2])]
# Backward in three stretches of rows, of unequal length where n does not divide.
IN_STRETCHES = [
    dict(stretches=3, loss="contrastive", negatives=n, positives=p, masked=m, images=m)
    for n, p in MODES
    for m in (False, True)
]
IN_STRETCHES += [dict(stretches=3, loss="contrastive", masked=True, **t) for t in TARGETS]
IDS = torch.tensor([5, 9, 5, 1, 9, 2, 7, 1, -5, 3, 4, 9])  # of images on several ranks, and of two on one


def run_case(module, case, image, text, patches, mask, ids=IDS):
    case = dict(case)
    if "same_image" in case:
        case["image_ids"] = ids
    kind, masked, images = case.pop("loss"), case.pop("masked"), case.pop("images", False)
    inputs = [t.clone().requires_grad_() for t in (image, text, patches, torch.tensor(9.0, dtype=torch.float64))]
    options = dict(text_mask=mask if masked else None, image_mask=mask.any(1) if images else None, **case)
    if kind == "contrastive":
        loss = module.multi_positive_contrastive_loss(inputs[0], inputs[1], inputs[3], **options)
    elif kind == "sigmoid":
        loss = module.multi_positive_sigmoid_loss(inputs[0], inputs[1], inputs[3], -inputs[3], **options)
    else:
        loss = module.subcaption_grouping_loss(inputs[2], inputs[1], inputs[3], **options)
    if loss.ndim:  # reduction="none": a rank's part of a sum over the world
        loss = loss.square().sum() * (1 if module is reference else dist.get_world_size(options.get("group")))
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads
