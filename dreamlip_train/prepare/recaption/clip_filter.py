"""Hallucinated sentences filtered out: what CLIP finds far from the picture is left out, and every score is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamlip_train.captions.columns import is_whole, split_sub_captions
from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.data.images import decode_image, resize_center_crop
from dreamlip_train.jobs.atomic_json import read_json
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.recaption.captioners import Answer


class ClipFilter:
    """Scores are cosines of a CLIP's image and text features, each sentence of a long caption by itself.

    Args:
        model: an open_clip folder (open_clip_config.json and weights), or a name of open_clip's table.
        weights: an open_clip weights file of the named model.
        keep_above: sentences of a lower score are left out.
    Raises:
        UserError: the model or its weights can't be loaded.
    """

    def __init__(self, model: str, weights: str, keep_above: float) -> None:
        import torch

        from dreamlip_train.model.build import build_model

        self.keep_above = keep_above
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = _folder_config(Path(model)) if Path(model).is_dir() else ModelConfig(name=model, pretrained=weights)
        self.model = build_model(config, seed=0).to(self.device).eval()

    def apply(self, images: Sequence[bytes], answers: Sequence[Answer]) -> list[Answer]:
        """The answers, their captions without the sentences below ``keep_above`` ("" where none is left), and
        {"NAME_scores": the score of every sentence that was said} beside each caption.
        """
        import torch

        results: list[Answer] = list(answers)
        by_place = {place: answer for place, answer in enumerate(answers) if isinstance(answer, dict)}
        if not by_place:
            return results
        size = self.model.image_size
        pictures = torch.stack([resize_center_crop(decode_image(images[place]), size) for place in by_place])
        with torch.inference_mode():
            features, _ = self.model.encode_images(pictures.to(self.device))
            for feature, (place, answer) in zip(features, by_place.items(), strict=True):
                results[place] = self._filtered(feature, answer)
        return results

    def _filtered(self, image: Any, answer: Mapping[str, str]) -> dict[str, Any]:
        """One picture's captions; ``image`` [D] is its unit feature."""
        result: dict[str, Any] = {}
        for column, caption in answer.items():
            sentences = split_sub_captions([caption] if is_whole(column) else caption)
            texts = self.model.encode_texts(self.model.tokenize(sentences).to(self.device))
            scores = (texts @ image).tolist()
            pairs = zip(sentences, scores, strict=True)
            result[column] = " ".join(text for text, score in pairs if score >= self.keep_above)
            result[scores_column(column)] = [round(score, 4) for score in scores]
        return result


def _folder_config(folder: Path) -> ModelConfig:
    """The model in an open_clip folder."""
    weights = next(folder.glob("open_clip_*.safetensors"), None) or next(folder.glob("open_clip_*.bin"), None)
    try:
        settings = read_json(folder / "open_clip_config.json")["model_cfg"]
        length = int(settings["text_cfg"].get("context_length", 77))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--clip-model: {str(folder)!r} is no open_clip folder: {error}") from error
    return ModelConfig(name=folder.name, config=settings, pretrained=str(weights or ""), context_length=length)


def scores_column(column: str) -> str:
    """Where a caption's scores are kept: longLLA_captions -> longLLA_scores."""
    return f"{column.removesuffix('_captions')}_scores"
