"""open_clip's own training program with K captions per image and sub-caption grouping.

    python examples/open_clip_k_captions.py                 # tiny data, a CPU, one epoch
    torchrun --nproc-per-node 2 examples/open_clip_k_captions.py --local-loss --gather-with-grad

In a copy of open_clip's main.py three lines change (marked below); here they are put in from outside, so that open_clip
stays as installed. Further arguments are open_clip's: ``--accum-freq 2 --grad-checkpointing --precision amp_bf16``.
"""

import os
import sys
import tempfile
from pathlib import Path

import open_clip_train.main as program
import tiny_clip
import tiny_world
import torch
from torch.nn.parallel import DistributedDataParallel

from dreamlip_kernels import DreamLIPLoss
from dreamlip_kernels.integrations.open_clip import SubCaptionTokenizer, accept_sub_captions

K = 3


def with_k_captions(main) -> None:
    """The three lines: tokenizer, model, loss."""
    get_tokenizer, create_model = main.get_tokenizer, main.create_model_and_transforms
    main.get_tokenizer = lambda *a, **k: SubCaptionTokenizer(get_tokenizer(*a, **k), K)  # 1

    def create(*args, **options):
        model, *transforms = create_model(*args, **options)
        return accept_sub_captions(model), *transforms  # 2

    main.create_model_and_transforms = create
    if hasattr(main, "create_loss"):  # open_clip 3.x
        main.create_loss = lambda args: DreamLIPLoss(rank=args.rank, world_size=args.world_size)  # 3
    else:  # later versions wrap model and loss in a task

        def create_task(args, *, model, **options):
            loss = DreamLIPLoss(rank=args.rank, world_size=args.world_size)  # 3
            return main.CLIPTask(model, loss=loss, device=options.get("device"))

        from open_clip.task import CLIPTask

        main.CLIPTask, main.create_task = CLIPTask, create_task


class WithoutDeviceIds(DistributedDataParallel):
    """open_clip passes ``device_ids``, which DDP refuses for a model on a CPU: for this example alone."""

    def __init__(self, module, device_ids=None, **options):
        super().__init__(module, **options)


def main(arguments: list[str]) -> None:
    """Make the data and the architecture, then hand over to open_clip."""
    folder = Path(os.environ.get("EXAMPLE_FOLDER") or tempfile.mkdtemp())
    train, val = (
        tiny_world.write_csv(folder / name, n, first) for name, n, first in (("train", 96, 0), ("val", 32, 96))
    )
    with_k_captions(program)
    torch.nn.parallel.DistributedDataParallel = WithoutDeviceIds
    options = {
        "--model": tiny_clip.register(folder),
        "--train-data": str(train),
        "--val-data": str(val),
        "--csv-separator": "\t",
        "--batch-size": "16",
        "--epochs": "1",
        "--lr": "1e-3",
        "--warmup": "2",
        "--workers": "1",
        "--logs": str(folder / "logs"),
        "--log-every-n-steps": "2",
        "--device": "cpu",
        "--dist-backend": "gloo",
    }
    program.main([*(word for pair in options.items() for word in pair), *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
