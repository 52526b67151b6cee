"""The ``export`` and ``import`` commands: our weights in other programs, and other programs' weights here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass
class ExportOptions:
    """Write a trained model as open_clip or transformers load it, and compare what they load with the original."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN of any ZeRO stage and number of ranks, or an open_clip weights
    file (with --model).
    """
    output: str
    """The file (open_clip-file) or new folder to write."""
    to: Literal["open_clip-file", "open_clip-dir", "hf-dir"] = "open_clip-file"
    """open_clip weights file; open_clip folder (local-dir:DIR); transformers' CLIPModel folder (LLaVA's vision
    tower).
    """
    model: str = ""
    """open_clip model name of a weights file."""


def export(arguments: list[str], program: str) -> None:
    """A trained model for open_clip, clip_benchmark, SAN, transformers and LLaVA: CHECKPOINT --to FORMAT --output
    PATH
    """
    options = tyro.cli(ExportOptions, args=arguments, prog=program)
    from dreamlip_train.checkpoint.interoperability.export import export_checkpoint

    difference = export_checkpoint(options.checkpoint, options.output, options.to, options.model)
    if difference["image"] is None:
        print(f"wrote {options.output}; not compared, since transformers is not installed")
    else:
        print(
            f"wrote {options.output}; loaded back, image features differ by {difference['image']:.1g}, "
            f"text features by {difference['text']:.1g}"
        )


@dataclass
class ImportOptions:
    """Weights from elsewhere as an open_clip file for --model.pretrained and eval, checked against the model they are
    said to be.
    """

    weights: tyro.conf.Positional[str]
    """An open_clip weights file (.pt, .safetensors; DreamLIP's published ones are such), an open_clip folder,
    or a transformers CLIP folder.
    """
    output: str
    """The file to write, or with a folder's own model config, the open_clip folder."""
    model: str = ""
    """open_clip model name of a weights file."""


def import_(arguments: list[str], program: str) -> None:
    """open_clip's, DreamLIP's or transformers' weights as a starting point: WEIGHTS --model NAME --output FILE"""
    options = tyro.cli(ImportOptions, args=arguments, prog=program)
    from dreamlip_train.checkpoint.interoperability.import_weights import import_weights

    print(import_weights(options.weights, options.output, options.model))
