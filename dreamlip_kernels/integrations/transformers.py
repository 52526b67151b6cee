"""K captions per image with Hugging Face's CLIPModel and Trainer: a module whose forward returns the loss.

    model = SubCaptionCLIP(CLIPModel.from_pretrained(...), chunk_size=64)
    Trainer(model, args, train_dataset=..., data_collator=SubCaptionCollator(processor, 8)).train()

The Trainer's own gradient accumulation shrinks the negatives to one small batch. ``chunk_size`` does not: the whole
``per_device_train_batch_size`` meets in the loss, and the towers hold the activations of one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..losses import DreamLIPLoss
from .sub_captions import draw, mean_of_sub_captions, split_sentences


class SubCaptionCollator:
    """[{"image": picture, "text": caption}, ..] -> pixel_values [N, C, H, W], input_ids and attention_mask [N, K, L],
    text_mask [N, K].

    Args:
        processor: a CLIPProcessor.
        num_sub_captions: K, drawn for each caption without replacement; missing ones have text_mask False.
        split: a caption's sub-captions; a list of strings is taken as it is.
    """

    def __init__(self, processor, num_sub_captions: int, split: Callable[[str], list[str]] = split_sentences):
        if num_sub_captions < 1:
            raise ValueError(f"SubCaptionCollator: num_sub_captions must be at least 1, got {num_sub_captions}")
        self.processor, self.num_sub_captions, self.split = processor, num_sub_captions, split

    def __call__(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        n, k = len(rows), self.num_sub_captions
        pixels = self.processor(images=[row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        captions = [self.split(row["text"]) if isinstance(row["text"], str) else list(row["text"]) for row in rows]
        sub_captions = [draw(caption, k) for caption in captions]
        mask = torch.tensor([[slot < len(texts) for slot in range(k)] for texts in sub_captions], dtype=torch.bool)
        texts = [text for caption in sub_captions for text in caption + [""] * (k - len(caption))]
        tokens = self.processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        ids, attention = (tokens[name].view(n, k, -1) for name in ("input_ids", "attention_mask"))
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": attention, "text_mask": mask}


class SubCaptionCLIP(nn.Module):
    """A CLIPModel that takes K captions per image and returns ``{"loss": ..}`` with its features,
    as the Trainer wants it.

    Each tower is called once per chunk; over ranks the loss gathers, so wrap with DDP as the Trainer does.

    Args:
        clip: a ``transformers.CLIPModel``; ``self.clip.save_pretrained`` saves what was trained.
        loss: called as DreamLIPLoss; by default a DreamLIPLoss.
        chunk_size: images whose activations are held at once (gradient caching); None holds those of the whole batch.
    """

    def __init__(self, clip: nn.Module, loss: nn.Module | None = None, chunk_size: int | None = None):
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"SubCaptionCLIP: chunk_size must be at least 1 or None, got {chunk_size}")
        self.clip: Any = clip
        self.loss, self.chunk_size = loss if loss is not None else DreamLIPLoss(), chunk_size

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        return_loss: bool = True,
    ) -> dict[str, Tensor]:
        """pixel_values [N, C, H, W], input_ids and attention_mask [N, K, L] or [N, L], text_mask [N, K] -> loss,
        features.

        In evaluation mode text_embeds is [N, D], the unit mean of a caption's sub-captions.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        input_ids, attention_mask = (v[:, None] if v.ndim == 2 else v for v in (input_ids, attention_mask))
        n, k, _ = input_ids.shape
        size = self.chunk_size or max(1, n)
        image, patches = self._in_chunks(self._images, size, pixel_values)
        (text,) = self._in_chunks(self._texts, size * k, input_ids.flatten(0, 1), attention_mask.flatten(0, 1))
        text = text.view(n, k, -1)
        mask = torch.ones(n, k, dtype=torch.bool, device=text.device) if text_mask is None else text_mask
        out = {}
        if return_loss:
            scale = self.clip.logit_scale.exp()
            out["loss"] = self.loss(image, text, scale, patch_features=patches, text_mask=mask)
        return out | {"image_embeds": image, "text_embeds": text if self.training else mean_of_sub_captions(text, mask)}

    def _in_chunks(self, tower: Callable[..., tuple[Tensor, ...]], size: int, *inputs: Tensor) -> list[Tensor]:
        """``tower`` of the inputs, ``size`` rows at a time; backward recomputes a chunk when it comes to it."""
        chunks = list(zip(*(v.split(size) for v in inputs), strict=True))
        if len(chunks) == 1:
            return list(tower(*chunks[0]))
        outputs = [checkpoint(tower, *chunk, use_reentrant=False) for chunk in chunks]
        return [torch.cat(parts) for parts in zip(*outputs, strict=True)]

    def _images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Unit image features [n, D], and patches [n, P, D]: every token but the first, normed and projected alike."""
        out = self.clip.vision_model(pixel_values=pixel_values)
        tower = getattr(self.clip.vision_model, "vision_model", self.clip.vision_model)
        patches = self.clip.visual_projection(tower.post_layernorm(out.last_hidden_state[:, 1:]))
        return nn.functional.normalize(self.clip.visual_projection(out.pooler_output), dim=-1), patches

    def _texts(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        out = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return (nn.functional.normalize(self.clip.text_projection(out.pooler_output), dim=-1),)
