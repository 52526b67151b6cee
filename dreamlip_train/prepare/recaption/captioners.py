"""Multimodal models that describe pictures: what they are asked and how an answer becomes a caption;
one run here through transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dreamlip_train.captions.columns import split_sub_captions
from dreamlip_train.data.images import decode_image
from dreamlip_train.jobs.user_error import UserError


@dataclass(frozen=True)
class Prompt:
    """A question, the column its answer goes to, and how many tokens the answer may have.

    With ``summary_column`` the answer's first sentence goes there, and the others to ``column``.
    """

    column: str
    text: str
    max_tokens: int
    summary_column: str = ""

    @property
    def columns(self) -> list[str]:
        """The columns that an answer fills."""
        return [self.column, *filter(None, [self.summary_column])]

    def captions(self, text: Any, cut: bool) -> dict[str, str]:
        """The captions in an answer that the token limit ``cut`` off, or did not.

        Raises:
            ValueError: it says nothing.
        """
        caption = caption_text(text, cut)
        if not self.summary_column:
            return {self.column: caption}
        summary, *rest = split_sub_captions(caption)
        return {self.column: " ".join(rest) or summary, self.summary_column: summary}


Picture = tuple[str, bytes]
"""A sample's key and its picture's file."""
Answer = dict[str, Any] | Exception
"""Captions by column (and scores, of a filter), or why there are none."""


def caption_text(text: Any, cut: bool) -> str:
    """A model's answer as a caption: white space collapsed, and without its last sentence if the token limit ``cut``
    that one off.

    Raises:
        ValueError: it says nothing.
    """
    whole = text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""  # without lone surrogates
    sentences = split_sub_captions(whole)
    if cut and len(sentences) > 1:
        sentences = sentences[:-1]
    if not sentences:
        raise ValueError(f"the model's answer is no caption: {text!r:.100}")
    return " ".join(sentences)


class LocalModel:
    """A Hugging Face image-text-to-text model (LLaVA, InstructBLIP, Qwen-VL, ..), in bf16 on a GPU, in fp32 on the CPU.

    Raises:
        UserError: transformers is not installed, or it can't load ``model``.
    """

    def __init__(self, model: str, prompts: Sequence[Prompt], *, trust_remote_code: bool = False) -> None:
        try:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise UserError(
                "--model: transformers is not installed; pip install 'dreamlip[recaption]', or use --endpoint"
            ) from error
        self.prompts = prompts
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not trust_remote_code:
            _refuse_foreign_code(model)
        try:
            # Said in so many words: left out, transformers would ask on standard input whether to run the folder's
            # code.
            self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
            self.model: Any = AutoModelForImageTextToText.from_pretrained(
                model,
                trust_remote_code=trust_remote_code,
                dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--model: {model!r} is no image-text-to-text model that transformers can load: {reason}"
            ) from error
        self.model.to(self.device).eval()
        self.processor.tokenizer.padding_side = "left"

    def answers(self, pictures: Iterator[Picture], at_once: int) -> Iterator[tuple[list[tuple[Picture, Answer]], int]]:
        """The pictures with their captions, ``at_once`` made together; with each group, that none is under way."""
        while batch := list(islice(pictures, at_once)):
            yield list(zip(batch, self.answer([image for _, image in batch]), strict=True)), 0

    def answer(self, images: Sequence[bytes]) -> list[Answer]:
        """Captions for each picture, which are made together."""
        from PIL import Image

        pictures: list[Any] = []
        answers: list[Answer] = [{} for _ in images]
        for place, data in enumerate(images):
            try:
                pictures.append((place, Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())))
            except ValueError as error:
                answers[place] = error
        for prompt in self.prompts if pictures else ():
            texts = self._generate([picture for _, picture in pictures], prompt)
            for (place, _), (text, cut) in zip(pictures, texts, strict=True):
                answer = answers[place]
                if isinstance(answer, dict):
                    try:
                        answer |= prompt.captions(text, cut)
                    except ValueError as error:
                        answers[place] = error
        return answers

    def _generate(self, pictures: list[Any], prompt: Prompt) -> list[tuple[str, bool]]:
        """(answer, whether the token limit cut it off) for each picture."""
        import torch

        texts = [self._question(prompt.text)] * len(pictures)
        inputs = self.processor(images=pictures, text=texts, return_tensors="pt", padding=True).to(
            self.device, self.model.dtype
        )
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=prompt.max_tokens, do_sample=False)
        question = inputs["input_ids"]
        # Decoder-only models repeat the question.
        if tokens.shape[1] >= question.shape[1] and bool((tokens[:, : question.shape[1]] == question).all()):
            tokens = tokens[:, question.shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=tokens.device)
        cut = ~torch.isin(tokens, ends).any(dim=1) & (tokens.shape[1] >= prompt.max_tokens)
        return list(zip(self.processor.batch_decode(tokens, skip_special_tokens=True), cut.tolist(), strict=True))

    def _question(self, prompt: str) -> str:
        """The prompt as the model was trained to be asked."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        if "llava" in self.model.config.model_type:
            return f"USER: <image>\n{prompt} ASSISTANT:"
        return prompt


def _refuse_foreign_code(model: str) -> None:
    """A folder may name Python files of its own to be run ("auto_map").

    Raises:
        UserError: it does.
    """
    from transformers import PretrainedConfig
    from transformers.processing_utils import ProcessorMixin

    for read in (PretrainedConfig.get_config_dict, ProcessorMixin.get_processor_dict):
        try:
            config = read(model)[0]
        except (OSError, ValueError, KeyError):
            continue  # said when the model is loaded
        if "auto_map" in config:
            raise UserError(
                f"--model: {model!r} brings Python code of its own, which can do anything you can; "
                "look at it, and give --trust-remote-code to run it"
            )
