"""``dreamlip-train recaption``: image shards in, shards with new long and short captions out.

A shard's answers are appended to ``OUTPUT/.recaption/NAME.jsonl`` as they come, so that nothing finished is asked for
twice; when the shard is done its copy appears under its own name. Processes on any machines share the shards through
claim files, or Ray hands them out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.data.shards.manifest import MANIFEST
from dreamlip_train.data.shards.shard_names import list_shards
from dreamlip_train.data.shards.shard_writer import ShardWriter
from dreamlip_train.data.shards.shards import ShardError, image_of, read_shard, record_of
from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.jobs.job_folder import claim_output
from dreamlip_train.jobs.map_tasks import map_tasks
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import RunError, UserError
from dreamlip_train.jobs.work_claims import Claims
from dreamlip_train.prepare.options import RecaptionOptions
from dreamlip_train.prepare.output_names import require_distinct_names
from dreamlip_train.prepare.recaption.captioners import Answer, LocalModel, Prompt
from dreamlip_train.prepare.recaption.endpoint import Endpoint

STATE = ".recaption"
_JUDGED_AFTER = 50  # pictures asked about before max_bad_fraction can stop a run


@dataclass(frozen=True)
class Settings:
    """Everything a worker needs to do a shard."""

    output: Path
    model: str
    endpoint: str
    prompts: tuple[Prompt, ...]
    batch_size: int
    timeout: float
    retries: int
    max_bad_fraction: float
    stale_minutes: float
    trust_remote_code: bool
    owner: str = ""


def recaption_shards(options: RecaptionOptions) -> Counter[str]:
    """Caption every picture of the shards that are neither done nor being done elsewhere; return what this call did.

    The columns long{name}_captions and short{name}_captions are added to each sample's json, everything else stays.
    A picture that could not be captioned keeps its place without them; the reason is in OUTPUT/.recaption/NAME.jsonl.

    Returns:
        counts "shards done", "done before", "busy elsewhere", "captioned", "kept from before", "failed".
    Raises:
        UserError: a setting does not work.
        RunError: more than ``max_bad_fraction`` of the pictures could not be captioned, or the disk is full.
    """
    output, settings = Path(options.output), _settings(options)
    paths = list_shards(options.shards, field="SHARDS")
    if any(Path(path).resolve().parent == output.resolve() for path in paths):
        raise UserError(
            f"--output: {str(output)!r} is the folder of the shards, which are not to be changed; give another"
        )
    require_distinct_names(paths, "SHARDS", "recaption the folders one at a time")
    job = {
        "shards": sorted(os.path.basename(path) for path in paths),
        "prompts": [vars(prompt) for prompt in settings.prompts],
        "model": options.model,
    }
    claim_output(output, STATE, job, "captions of other shards, prompts or another model")
    total: Counter[str] = Counter()
    try:
        with Progress(f"recaption {output}") as progress:
            for done in _each(settings, paths, options.ray):
                total.update(done)
                progress.update(", ".join(f"{count} {what}" for what, count in total.items()))
    except OSError as error:
        free = shutil.disk_usage(output).free / 1e9
        raise RunError(
            f"--output: {error} ({free:.2f} GB free). Finished captions are kept; make room and give the same command "
            "again"
        ) from error
    _write_manifest(output, paths)
    return total


def _settings(options: RecaptionOptions) -> Settings:
    """What a worker needs of the options, checked."""
    asked = (
        (f"long{options.name}_captions", options.long_prompt, options.max_tokens),
        (f"short{options.name}_captions", options.short_prompt, max(1, options.max_tokens // 4)),
    )
    prompts = tuple(Prompt(column, text, tokens) for column, text, tokens in asked if text)
    if not prompts:
        raise UserError("--long-prompt, --short-prompt: both are empty; there is nothing to ask")
    if not options.name.isidentifier():
        raise UserError(f"--name: got {options.name!r}; it becomes part of a column's name: give letters and digits")
    if options.batch_size < 1 or options.max_tokens < 1 or options.retries < 0 or options.timeout <= 0:
        raise UserError(
            f"--batch-size, --max-tokens, --retries, --timeout: got {options.batch_size}, {options.max_tokens}, "
            f"{options.retries}, {options.timeout}; too small"
        )
    return Settings(
        output=Path(options.output),
        model=options.model,
        endpoint=options.endpoint,
        prompts=prompts,
        batch_size=options.batch_size,
        timeout=options.timeout,
        retries=options.retries,
        max_bad_fraction=options.max_bad_fraction,
        stale_minutes=options.stale_minutes,
        trust_remote_code=options.trust_remote_code,
        owner=f"ray:{options.ray}" if options.ray else "",
    )


def _each(settings: Settings, paths: list[str], ray_address: str) -> Iterator[Counter[str]]:
    """The shards one after another in this process, whose model they share, or as tasks on Ray."""
    if ray_address:
        gpus = 0 if settings.endpoint else 1
        yield from map_tasks(_Task(settings), paths, ray_address=ray_address, gpus_if_any=gpus)
    else:
        yield from map(_Task(settings), paths)


_captioners: dict[Settings, Any] = {}


def _captioner(settings: Settings) -> Any:
    """The model, made once a process."""
    if settings not in _captioners:
        _captioners.clear()
        if settings.endpoint:
            _captioners[settings] = Endpoint(
                settings.endpoint,
                settings.model,
                settings.prompts,
                parallel=settings.batch_size,
                timeout=settings.timeout,
                retries=settings.retries,
            )
        else:
            _captioners[settings] = LocalModel(
                settings.model, settings.prompts, trust_remote_code=settings.trust_remote_code
            )
    return _captioners[settings]


class _Task:
    """Caption one shard, unless it is done or somebody else's."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, shard: str) -> Counter[str]:
        settings, name = self.settings, os.path.basename(shard)
        state = settings.output / STATE
        if _is_done(settings.output, name):
            return Counter({"done before": 1})
        claims = Claims(state / "claims", 60 * settings.stale_minutes, settings.owner)
        if not claims.take(name):
            return Counter({"busy elsewhere": 1})
        try:
            if _is_done(settings.output, name):  # by the one who has just released it
                return Counter({"done before": 1})
            found, counts = self._answers(shard, state / f"{name}.jsonl", claims)
            _write_shard(shard, settings, found)
            counts["shards done"] += 1
            return counts
        finally:
            claims.release(name)

    def _answers(self, shard: str, path: Path, claims: Claims) -> tuple[dict[str, dict[str, str]], Counter[str]]:
        """Captions by key: those kept from before, and new ones, which are written down as they come."""
        found = _read_answers(path, self.settings.prompts)
        counts = Counter({"kept from before": len(found)})
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                file.write("\n")  # a crash cut the last line off
            for batch in _batches(shard, set(found), self.settings.batch_size):
                answers: list[Answer] = _captioner(self.settings).answer([image for _, image in batch])
                for (key, _), answer in zip(batch, answers, strict=True):
                    if isinstance(answer, dict):
                        found[key] = answer
                    line = (
                        {"key": key, **answer}
                        if isinstance(answer, dict)
                        else {"key": key, "error": f"{type(answer).__name__}: {answer}"}
                    )
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    counts["captioned" if isinstance(answer, dict) else "failed"] += 1
                file.flush()
                os.fsync(file.fileno())
                claims.renew(os.path.basename(shard))
                self._judge(counts, path)
        return found, counts

    def _judge(self, counts: Counter[str], path: Path) -> None:
        asked = counts["captioned"] + counts["failed"]
        if asked >= _JUDGED_AFTER and counts["failed"] > self.settings.max_bad_fraction * asked:
            last = next(
                json.loads(line)["error"]
                for line in reversed(path.read_text(encoding="utf-8").splitlines())
                if '"error"' in line
            )
            raise RunError(
                f"--max-bad-fraction: {counts['failed']} of {asked} pictures could not be captioned, "
                f"the last because of {last}. The reasons are in {path}; "
                "finished captions are kept, and the same command goes on"
            )


def _batches(shard: str, done: set[str], size: int) -> Iterator[list[tuple[str, bytes]]]:
    """(key, picture) of the samples that are not done, by the batch, up to the end of the shard or its damage."""
    batch = []
    try:
        for sample in read_shard(shard):
            image = image_of(sample)
            if image is not None and sample["key"] not in done:
                batch.append((sample["key"], image))
            if len(batch) == size:
                yield batch
                batch = []
    except ShardError:
        pass  # the copy's counts say so
    if batch:
        yield batch


def _read_answers(path: Path, prompts: tuple[Prompt, ...]) -> dict[str, dict[str, str]]:
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            continue
        if all(prompt.column in answer for prompt in prompts):
            found[answer.pop("key")] = answer
    return found


def _is_done(output: Path, name: str) -> bool:
    known = output / STATE / f"{name}.json"
    return known.exists() and (
        (output / name).exists() or not json.loads(known.read_text(encoding="utf-8"))["entry"]["samples"]
    )


def _write_shard(shard: str, settings: Settings, found: dict[str, dict[str, str]]) -> None:
    """The shard's copy with the captions in, then the note that it is done."""
    name = os.path.basename(shard)
    final, counts, with_image = settings.output / name, Statistics(), 0
    with ShardWriter(final) as writer:
        try:
            for sample in read_shard(shard):
                with_image += image_of(sample) is not None
                _add(writer, sample, found.get(sample["key"]), counts, shard)
        except ShardError as error:
            counts.add_bad("shard could not be read to its end", shard, f"after {writer.samples} samples: {error}")
    entry = {"samples": with_image, "bytes": final.stat().st_size if writer.samples else 0}
    write_json(settings.output / STATE / f"{name}.json", {"entry": entry, "counts": counts.state})


def _add(
    writer: ShardWriter, sample: dict[str, Any], captions: dict[str, str] | None, counts: Statistics, shard: str
) -> None:
    name = f"{shard}: {sample['key']}"
    try:
        record = record_of(sample)
    except (ValueError, RecursionError) as error:
        counts.add_bad("unreadable json replaced", name, str(error))
        record = {}
    record |= captions or {}
    writer.add({**sample, "json": json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")})
    if captions is None:
        counts.add_bad("not captioned" if image_of(sample) is not None else "no image", name)
    if image_of(sample) is not None and caption_pool(record):
        counts.add_sample(record, None, "mask.png" in sample)


def _write_manifest(output: Path, paths: list[str]) -> None:
    """manifest.json over the shards that are done."""
    total, listed = Statistics(), {}
    for name in sorted(os.path.basename(path) for path in paths):
        if _is_done(output, name):
            known = json.loads((output / STATE / f"{name}.json").read_text(encoding="utf-8"))
            total.merge(Statistics(known["counts"]))
            if known["entry"]["samples"]:
                listed[name] = known["entry"]
    write_json(output / MANIFEST, {"format": 1, **total.summary(), "shards": listed})


def format_counts(counts: Counter[str]) -> str:
    """What a call did, as text to read."""
    order = ("shards done", "done before", "busy elsewhere", "captioned", "kept from before", "failed")
    return "\n".join(
        f"{counts[what]:>10} {what}" for what in order if counts[what] or what in ("shards done", "captioned")
    )
