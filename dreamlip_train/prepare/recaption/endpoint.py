"""A multimodal model behind an OpenAI-compatible server: patient with trouble that passes, bounded in time and
bytes.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any

from dreamlip_train.data.images import decode_image, media_type
from dreamlip_train.jobs.atomic_json import parse_json
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.recaption.captioners import Answer, Picture, Prompt

_FIRST_PAUSE = 1.0  # seconds before the second attempt; doubling, up to a minute
_LONGEST_PAUSE = 60.0
_LARGEST_ANSWER = 4 * 2**20  # bytes; a caption is a few hundred
_LARGEST_REFUSAL = 64 * 2**10
_SAID = 300  # characters that are kept of what a server says


class ServerError(Exception):
    """An answer that is no success: its status, what it says, and the seconds to wait."""

    def __init__(self, status: int, message: str, retry_after: float) -> None:
        super().__init__(f"status {status}: {message[:_SAID]}")
        self.status, self.retry_after = status, retry_after


class Endpoint:
    """Each picture and prompt is a request of its own.

    An answer that fails, is not whole after ``timeout`` seconds or is garbage is asked for again, ``retries`` times,
    with doubling pauses, or after as long as the server says in Retry-After (a minute at most).

    Raises:
        UserError: openai is not installed, or ``url`` is no URL.
    """

    def __init__(self, url: str, model: str, prompts: Sequence[Prompt], *, timeout: float, retries: int) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("--endpoint: openai is not installed; pip install 'dreamlip[recaption]'") from error
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--endpoint: got {url!r}; give a base URL such as http://localhost:8000/v1")
        self.openai, self.url, self.model, self.prompts = openai, url, model, prompts
        self.timeout, self.retries = timeout, retries
        self.loop = asyncio.new_event_loop()
        # The client's own retries know nothing of garbage.
        self.client = openai.AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout,
            max_retries=0,
            # A body of an error or a redirect would be read whole, however large. The key is for this server alone.
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_refuse]}),
        )

    def answers(self, pictures: Iterator[Picture], at_once: int) -> Iterator[tuple[list[tuple[Picture, Answer]], int]]:
        """The pictures with their captions as they come, those of ``at_once`` pictures under way: none waits for a slow
        one. With each group, how many are still under way.

        Raises:
            UserError: the server refuses the key, or knows no such model.
        """
        under_way: dict[asyncio.Task[Answer], Picture] = {}
        try:
            while True:
                for picture in islice(pictures, at_once - len(under_way)):
                    under_way[self.loop.create_task(self._answer(picture[1]))] = picture
                if not under_way:
                    return
                waiting = asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                ended = [(under_way.pop(task), task) for task in self.loop.run_until_complete(waiting)[0]]
                if whole := [(picture, task.result()) for picture, task in ended if task.exception() is None]:
                    yield whole, len(under_way)
                for _, task in ended:
                    task.result()  # raises what ends the run, once the others are written down
        finally:
            self.loop.run_until_complete(_cancel(under_way))

    async def _answer(self, image: bytes) -> Answer:
        try:
            picture = _data_url(image)
            answer: dict[str, str] = {}
            for prompt in self.prompts:
                answer |= await self._patiently(picture, prompt)
            return answer
        except ServerError as error:
            if error.status in (401, 403, 404):
                raise UserError(
                    f"--endpoint: {self.url} refuses: {error}; check OPENAI_API_KEY, --model {self.model!r} "
                    "and the address, which ends in /v1 at most servers"
                ) from error
            if 300 <= error.status < 400:
                raise UserError(f"--endpoint: {self.url} is elsewhere ({error}); give that address") from error
            return error
        except (self.openai.OpenAIError, ValueError, TimeoutError) as error:
            return error

    async def _patiently(self, picture: str, prompt: Prompt) -> dict[str, str]:
        pause = _FIRST_PAUSE
        for attempt in range(self.retries + 1):
            retry_after = 0.0
            try:
                return prompt.captions(*await asyncio.wait_for(self._ask(picture, prompt), self.timeout))
            except ServerError as error:
                if attempt == self.retries or (error.status < 500 and error.status not in (408, 409, 429)):
                    raise
                retry_after = error.retry_after
            except (self.openai.OpenAIError, ValueError):
                if attempt == self.retries:
                    raise
            except TimeoutError as error:
                if attempt == self.retries:
                    raise TimeoutError(f"no whole answer within {self.timeout:g} seconds") from error
            await asyncio.sleep(max(pause * random.uniform(0.5, 1.0), retry_after))
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")

    async def _ask(self, picture: str, prompt: Prompt) -> tuple[Any, bool]:
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": prompt.text}]
        request = self.client.chat.completions.with_streaming_response.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=prompt.max_tokens,
            temperature=0.0,
        )
        try:
            async with request as reply:
                return _answer(await _read(reply.iter_bytes()))
        except self.openai.APIConnectionError as error:
            if isinstance(error.__cause__, ServerError):
                raise error.__cause__ from None
            raise


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _refuse(response: Any) -> None:
    """Raise ``ServerError`` for an answer that is no success, with what the beginning of its body says."""
    if 200 <= response.status_code < 300:
        return
    body = bytearray()
    async for part in response.aiter_raw():
        body += part
        if len(body) > _LARGEST_REFUSAL:
            break
    await response.aclose()
    location = response.headers.get("location", "")
    message = f"it redirects to {location}" if location else _message(bytes(body))
    raise ServerError(response.status_code, message, _retry_after(response.headers))


def _message(body: bytes) -> str:
    """What an error's body says: its message, as OpenAI's servers have one, or else its text."""
    try:
        content = parse_json(body)
        return str(content["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace").strip()


async def _read(parts: AsyncIterator[bytes]) -> bytes:
    """A body, up to ``_LARGEST_ANSWER``.

    Raises:
        ValueError: it is larger, or breaks off.
    """
    body = bytearray()
    try:
        async for part in parts:
            body += part
            if len(body) > _LARGEST_ANSWER:
                break
    except Exception as error:  # the HTTP client's own: a connection that ends in the middle, damaged gzip
        raise ValueError(f"the server's answer breaks off: {type(error).__name__}: {error}") from error
    if len(body) > _LARGEST_ANSWER:
        raise ValueError(f"the server's answer is larger than {_LARGEST_ANSWER:,} bytes")
    return bytes(body)


def _answer(body: bytes) -> tuple[Any, bool]:
    """(what a chat completion says, whether the token limit cut it off).

    Raises:
        ValueError: there is none.
    """
    try:
        choice = parse_json(body)["choices"][0]
        return choice["message"]["content"], choice.get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the server's answer is no chat completion: {body[:100]!r}") from error


def _retry_after(headers: Any) -> float:
    """Seconds that the server wants to be left alone, said in seconds or as a date; at most a minute."""
    value = headers.get("retry-after", "0")
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
            now = parsedate_to_datetime(headers["date"]) if headers.get("date") else datetime.now(UTC)  # its own clock
            seconds = (at - now).total_seconds()
        except (ValueError, TypeError, OverflowError):  # no date, or one with a time zone and one without
            return 0.0
    return min(max(0.0, seconds), _LONGEST_PAUSE)


def _data_url(image: bytes) -> str:
    """The picture for a server, once it decodes: JPEG, PNG, WebP and GIF as they are, what servers can't read as
    PNG.
    """
    from PIL import Image

    kind = media_type(image)
    if kind not in ("image/jpeg", "image/png", "image/webp", "image/gif"):
        file = io.BytesIO()
        Image.fromarray(decode_image(image).permute(1, 2, 0).numpy()).save(file, "PNG")
        kind, image = "image/png", file.getvalue()
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"
