"""The ``show`` and ``explore`` commands: where sentences look, in a picture and on a page."""

from __future__ import annotations

import dataclasses
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from dreamlip_train.cli.usage import require_picture, say
from dreamlip_train.config.schema import Config
from dreamlip_train.jobs.user_error import UserError


@dataclass
class ShowOptions:
    """Draw the patches that sentences of your own select in an image of your own."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN, or an open_clip weights file (with --model)."""
    image: tyro.conf.Positional[str]
    """A picture: JPEG, PNG, WebP, GIF or BMP."""
    captions: tyro.conf.Positional[tuple[str, ...]]
    """Sentences, each in quotes."""
    output: str = "show.png"
    """Where to write the figure."""
    model: str = ""
    """open_clip model name of a weights file."""
    weights: Literal["", "average", "raw"] = ""
    """"average": the moving average of a run with train.ema_decay; "raw": the weights of the last step; empty: what the
    run's eval.weights says, which is raw where nobody set it.
    """
    threshold: float | None = None
    """Threshold of the patch selection; None takes the run's."""


def show(arguments: list[str], program: str) -> None:
    """The patches that sentences select in a picture of your own: RUN image.jpg "a caption" "another" """
    options = tyro.cli(ShowOptions, args=arguments, prog=program)
    captions = [caption.strip() for caption in options.captions]
    if not captions or not all(captions):
        raise UserError(f"CAPTIONS: got {list(options.captions)}; give at least one sentence, each in quotes")
    require_picture(options.output)
    data = _read(options.image, "IMAGE")
    from dreamlip_train.reporting.grouping_figure import plot_sentences

    model, _, selection = _load(options)
    plot_sentences(model, Path(options.image).name, data, captions, options.output, **selection)
    say(f"wrote {options.output}")


@dataclass
class ExploreOptions:
    """A page on which you type a sentence, choose a picture and see the patches that the sentence selects."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN, or an open_clip weights file (with --model)."""
    images: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A picture of your own to begin with; give it again for more. The page takes others."""
    val_shards: str = ""
    """Held-out shards to begin with; empty means those of the run."""
    max_samples: int = 60
    """At most so many pictures of the held-out shards; 0 shows none."""
    model: str = ""
    """open_clip model name of a weights file."""
    weights: Literal["", "average", "raw"] = ""
    """"average": the moving average of a run with train.ema_decay; "raw": the weights of the last step; empty: what the
    run's eval.weights says, which is raw where nobody set it.
    """
    threshold: float | None = None
    """Threshold that the page begins with; None takes the run's."""
    port: int = 0
    """Port on 127.0.0.1; 0 takes a free one."""


def explore(arguments: list[str], program: str) -> None:
    """A page on this machine: type a sentence, choose a picture, see its patches: RUN"""
    options = tyro.cli(ExploreOptions, args=arguments, prog=program)
    _require_port(options.port)
    files = [(path, _read(path, "--images")) for path in options.images]
    from dreamlip_train.reporting.explore import explorer_server

    explorer = _explorer(options, files)
    try:
        server = explorer_server(explorer, options.port)
    except OSError as error:  # taken while the model was loaded
        raise _unusable(options.port, error) from error
    say(f"http://127.0.0.1:{server.server_address[1]}  ({len(explorer.pictures)} pictures; Ctrl-C ends it)")
    with server:
        server.serve_forever()


def _require_port(port: int) -> None:
    """Before a model is loaded for it."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port: got {port}; give 0 to 65535")
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise _unusable(port, error) from error


def _unusable(port: int, error: OSError) -> UserError:
    return UserError(f"--port: {port} can't be used ({error.strerror}); give another, or 0")


def _explorer(options: ExploreOptions, files: list[tuple[str, bytes]]) -> Any:
    """The model with the pictures it begins with: the user's, then held-out ones."""
    from dreamlip_train.reporting.explore import Explorer

    model, config, selection = _load(options)
    explorer = Explorer(model, **selection)
    for path, data in files:
        explorer.add_file(Path(path).name, data)
    held_out = dataclasses.replace(config.data, val_shards=options.val_shards or config.data.val_shards)
    if options.max_samples > 0 and held_out.val_shards:
        try:
            explorer.add_held_out(held_out, options.max_samples)
        except UserError as error:  # a run is still looked at where its held-out shards are gone
            if options.val_shards:
                raise
            say(f"the run's held-out shards are left out: {error}")
    return explorer


def _load(options: ShowOptions | ExploreOptions) -> tuple[Any, Config, dict[str, Any]]:
    """The model on its device, its config, and how it selects patches.

    Raises:
        UserError: the threshold is none, or there is no such model.
    """
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold: got {options.threshold}; give a number from 0 to 1")
    import torch

    from dreamlip_train.checkpoint.weights import load_for_eval

    model, config = load_for_eval(options.checkpoint, options.model, options.weights)
    if options.threshold is not None:
        config.eval.threshold = options.threshold
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), config, config.selection()


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {path!r} can't be read: {error.strerror}") from error
