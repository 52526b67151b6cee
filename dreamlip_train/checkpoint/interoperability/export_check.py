"""What an exported model gives when it is loaded as docs/interoperability.md says: raw pictures and raw text in,
features out.

It runs in a process of its own that has imported nothing of the trainer: no patched class, no tokenizer of ours.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from dreamlip_train.jobs.user_error import RunError

# Imported once by the server that forks the fresh processes: transformers loads what it is asked for late.
_LIBRARIES = [
    "open_clip",
    "transformers.models.clip.image_processing_clip",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
]

PROBE_TEXTS = (
    "a photo of a dog",
    "Two RED cars, isn't it? 12,000 trees",
    "one two three four five six seven eight nine ten " * 40,
)


def probe_picture(size: int) -> np.ndarray:
    """uint8 [size, size, 3]: of the model's own size, since libraries differ in how they resize."""
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def consumer_features(path: Path, to: str, name: str, size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Unit features [1,D] of the probe picture and [3,D] of the probe texts from the model at ``path``,
    in a fresh process.

    Args:
        to: the format it was written in.
        name: open_clip's name of the model, which loads an open_clip-file.
    Returns:
        None where the library that loads the format is not installed.
    """
    library = "transformers" if to == "hf-dir" else "open_clip"
    if importlib.util.find_spec(library) is None:
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    load = {"open_clip-file": _open_clip_file, "open_clip-dir": _open_clip_dir, "hf-dir": _transformers}[to]
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(load, str(path), name, size).result()
        except BrokenProcessPool as error:
            raise RunError(
                f"--output: the process that loads {str(path)!r} to compare it died, perhaps killed by the system for "
                "its memory; nothing is written"
            ) from error


def _open_clip_file(path: str, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=path)
    return _open_clip(model, preprocess, open_clip.get_tokenizer(name), size)


def _open_clip_dir(path: str, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{path}")
    return _open_clip(model, preprocess, open_clip.get_tokenizer(f"local-dir:{path}"), size)


def _open_clip(model: Any, preprocess: Any, tokenizer: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    import torch
    from PIL import Image

    with torch.inference_mode():
        pixels = preprocess(Image.fromarray(probe_picture(size)))[None]
        image = model.eval().encode_image(pixels, normalize=True)
        text = model.encode_text(tokenizer(list(PROBE_TEXTS)), normalize=True)
    return image.numpy(), text.numpy()


def _transformers(path: str, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(path).eval(), CLIPTokenizer.from_pretrained(path)
    picture = Image.fromarray(probe_picture(size))
    inputs = CLIPImageProcessor.from_pretrained(path)(images=picture, return_tensors="pt")
    inputs |= tokenizer(list(PROBE_TEXTS), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    return outputs.image_embeds.numpy(), outputs.text_embeds.numpy()
