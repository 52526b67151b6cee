"""Model FLOPs: what a step's images and tokens cost the towers, and the peak of the device they run on,
for TFLOP/s and MFU.

As usual a multiply-add is 2 FLOPs, backward costs twice the forward, recomputation and padding are not counted,
and neither is the loss (under 1 % of a step).
"""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamlip_train.model.dreamlip import DreamLIP

# Dense bf16 tensor-core TFLOP/s by words of the device's name, from the makers' data sheets;
# the first whose words are all there counts.
_PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
}


def training_flops(model: DreamLIP) -> tuple[float, float]:
    """(FLOPs of an image, FLOPs of a caption token), forward and backward, counted on a copy without data."""
    towers = copy.deepcopy(model).to("meta")
    images = torch.empty(1, 3, model.image_size, model.image_size, device="meta")
    caption = torch.zeros(1, 1, model.context_length, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as of_image:
        towers.encode_images(images)
    with torch.no_grad(), FlopCounterMode(display=False) as of_both:
        towers(images, caption)
    image, both = of_image.get_total_flops(), of_both.get_total_flops()
    return 3.0 * image, 3.0 * (both - image) / model.context_length


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's bf16 peak in FLOP/s; None for a CPU, an unknown device, or fp32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(name: str) -> float | None:
    """The bf16 peak in FLOP/s of a device such as "NVIDIA A100-SXM4-80GB", None if it is not in the table."""
    words = set(name.replace("-", " ").split())
    return next((1e12 * peak for part, peak in _PEAK_TFLOPS.items() if words >= set(part.split())), None)
