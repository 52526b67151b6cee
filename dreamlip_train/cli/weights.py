"""The ``export`` and ``import`` commands: our weights in other programs, and other programs' weights here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dreamlip_train.cli.usage import say
from dreamlip_train.jobs.user_error import UserError


@dataclass
class ExportOptions:
    """Write a trained model as open_clip or transformers load it, and compare what they load with the original."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN of any ZeRO stage and number of ranks, or an open_clip weights
    file (with --model).
    """
    output: str
    """The file (open_clip-file) or new folder to write."""
    to: Literal["open_clip-file", "open_clip-dir", "hf-dir", "hub"] = "open_clip-file"
    """open_clip weights file; open_clip folder (local-dir:DIR); transformers' CLIPModel folder (LLaVA's vision
    tower); both folders in one with a model card, as a repository on the Hugging Face Hub has them.
    """
    push: str = ""
    """With --to hub: OWNER/NAME of the repository to put the folder into; a new one is private."""
    license: str = "unknown"
    """With --to hub: the weights' license as the Hub names it, such as apache-2.0 or cc-by-nc-4.0."""
    model: str = ""
    """open_clip model name of a weights file."""
    weights: Literal["", "average", "raw"] = ""
    """"average": the moving average of a run with train.ema_decay; "raw": the weights of the last step; empty: what the
    run's eval.weights says, which is raw where nobody set it.
    """


def export(arguments: list[str], program: str) -> None:
    """A trained model for open_clip, clip_benchmark, SAN, transformers and LLaVA: CHECKPOINT --to FORMAT --output
    PATH
    """
    options = tyro.cli(ExportOptions, args=arguments, prog=program)
    from dreamlip_train.checkpoint.interoperability.export import export_checkpoint

    if options.to != "hub" and (options.push or options.license != "unknown"):
        raise UserError("--push and --license belong to --to hub")
    difference = export_checkpoint(
        options.checkpoint,
        options.output,
        options.to,
        options.model,
        weights=options.weights,
        repository=options.push,
        license=options.license,
    )
    if difference["image"] is None:
        say(f"wrote {options.output}; not compared, since transformers is not installed")
    else:
        say(
            f"wrote {options.output}; loaded back, image features differ by {difference['image']:.1g}, "
            f"text features by {difference['text']:.1g}"
        )
    if options.push:
        from dreamlip_train.checkpoint.interoperability.hub import upload

        say(f"put into {upload(Path(options.output), options.push)}")


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

    say(import_weights(options.weights, options.output, options.model))
