"""Multimodal models that describe pictures: one run here through transformers, or one behind an OpenAI-compatible server."""

from __future__ import annotations

import base64
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dreamlip_train.captions.columns import split_sub_captions
from dreamlip_train.data.images import decode_image, media_type
from dreamlip_train.jobs.user_error import UserError

_FIRST_PAUSE = 1.0  # seconds before the second attempt; doubling, up to a minute
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Prompt:
    """A question, the column its answer goes to, and how many tokens the answer may have."""

    column: str
    text: str
    max_tokens: int


Answer = dict[str, str] | Exception
"""Captions by column, or why there are none."""


def caption_text(text: Any, cut: bool) -> str:
    """A model's answer as a caption: white space collapsed, and without its last sentence if the token limit ``cut`` that one off.

    Raises:
        ValueError: it says nothing.
    """
    sentences = split_sub_captions(text) if isinstance(text, str) else []
    if cut and len(sentences) > 1:
        sentences = sentences[:-1]
    if not sentences:
        raise ValueError(f"the model's answer is no caption: {text!r:.100}")
    return " ".join(sentences)


class LocalModel:
    """A Hugging Face image-text-to-text model (LLaVA, ShareGPT4V's LLaVA checkpoints, InstructBLIP, ..), in bf16 on a GPU, in fp32 on the CPU.

    Raises:
        UserError: transformers is not installed, or it can't load ``model``.
    """

    def __init__(self, model: str, prompts: Sequence[Prompt]) -> None:
        try:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise UserError(
                "--model: transformers is not installed; pip install 'dreamlip[recaption]', or use --endpoint"
            ) from error
        self.prompts = prompts
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.processor = AutoProcessor.from_pretrained(model)
            self.model = AutoModelForImageTextToText.from_pretrained(
                model, dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--model: {model!r} is no image-text-to-text model that transformers can load: {reason}"
            ) from error
        self.model.to(self.device).eval()
        self.processor.tokenizer.padding_side = "left"

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
                        answer[prompt.column] = caption_text(text, cut)
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
        asked = inputs["input_ids"]
        # Decoder-only models repeat the question.
        if tokens.shape[1] >= asked.shape[1] and bool((tokens[:, : asked.shape[1]] == asked).all()):
            tokens = tokens[:, asked.shape[1] :]
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


class Endpoint:
    """A model behind an OpenAI-compatible server; each picture is a request of its own, ``parallel`` of them under way.

    An answer that fails, stalls beyond ``timeout`` seconds or is garbage is asked for again, ``retries`` times, with doubling pauses.

    Raises:
        UserError: openai is not installed.
    """

    def __init__(
        self, url: str, model: str, prompts: Sequence[Prompt], *, parallel: int, timeout: float, retries: int
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("--endpoint: openai is not installed; pip install 'dreamlip[recaption]'") from error
        self.openai, self.url, self.model, self.prompts, self.retries = openai, url, model, prompts, retries
        # The client's own retries know nothing of garbage.
        self.client = openai.OpenAI(
            base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=timeout, max_retries=0
        )
        self.threads = ThreadPoolExecutor(parallel)

    def answer(self, images: Sequence[bytes]) -> list[Answer]:
        """Captions for each picture.

        Raises:
            UserError: the server refuses the key, or knows no such model.
        """
        return list(self.threads.map(self._answer, images))

    def _answer(self, image: bytes) -> Answer:
        try:
            data = f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}"
            return {
                prompt.column: self._patiently(lambda prompt=prompt: self._ask(data, prompt)) for prompt in self.prompts
            }
        except (self.openai.AuthenticationError, self.openai.PermissionDeniedError, self.openai.NotFoundError) as error:
            raise UserError(
                f"--endpoint: {self.url} refuses: {error}; check OPENAI_API_KEY and --model {self.model!r}"
            ) from error
        except (self.openai.OpenAIError, ValueError) as error:
            return error

    def _patiently(self, ask: Callable[[], str]) -> str:
        pause = _FIRST_PAUSE
        for attempt in range(self.retries + 1):
            try:
                return ask()
            except self.openai.APIStatusError as error:
                if attempt == self.retries or (error.status_code < 500 and error.status_code not in (408, 409, 429)):
                    raise
            except (self.openai.OpenAIError, ValueError):
                if attempt == self.retries:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")

    def _ask(self, image: str, prompt: Prompt) -> str:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": prompt.text}]
        reply = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=prompt.max_tokens,
            temperature=0.0,
        )
        try:
            choice = reply.choices[0]
            return caption_text(choice.message.content, choice.finish_reason == "length")
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"the server's answer is no chat completion: {str(reply)[:100]!r}") from error
