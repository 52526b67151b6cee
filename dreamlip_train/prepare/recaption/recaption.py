"""``dreamlip-train recaption``: image shards in, shards with new long and short captions out.

A shard's answers are appended to ``OUTPUT/.recaption/NAME.jsonl`` as they come, so that nothing finished is asked for
twice; when the shard is done its copy appears under its own name. Processes on any machines share the shards through
claim files, or Ray hands them out.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dreamlip_train.data.shards.manifest import count_samples, indexed_samples
from dreamlip_train.data.shards.manifest_writer import Manifest
from dreamlip_train.data.shards.shard_names import Shard, file_name, list_shards, scheme_of
from dreamlip_train.jobs.job_folder import finished, job_folder
from dreamlip_train.jobs.map_tasks import map_tasks
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.options import RecaptionOptions
from dreamlip_train.prepare.output_names import require_another_folder, require_distinct_names
from dreamlip_train.prepare.recaption.answers import AnswersElsewhere
from dreamlip_train.prepare.recaption.captioners import Prompt
from dreamlip_train.prepare.recaption.shard_task import RecaptionSettings, ShardTask

STATE = ".recaption"


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
    shards = list_shards(options.shards, field="SHARDS")
    require_another_folder(shards, output, "--output")
    require_distinct_names(shards, "SHARDS", "recaption the folders one at a time")
    job = {
        "shards": sorted(file_name(shard) for shard in shards),
        "prompts": [{name: value for name, value in vars(prompt).items() if value} for prompt in settings.prompts],
        "model": options.model,
    }
    if settings.keep_above is not None:
        job["filter"] = [settings.clip_model, settings.clip_weights, settings.keep_above]
    with job_folder(output, STATE, job, "captions of other shards, prompts or another model", shared=True):
        total = _caption_all(settings, shards, options.ray)
        manifest = Manifest()
        for shard in shards:
            note = finished(*settings.paths(shard))
            if note is not None:
                manifest.add(file_name(shard), note)
        manifest.write(output)
    return total


def _prompts(options: RecaptionOptions) -> tuple[Prompt, ...]:
    long, short = f"long{options.name}_captions", f"short{options.name}_captions"
    if options.summary_prompt:
        return (Prompt(long, options.summary_prompt, options.max_tokens, summary_column=short),)
    prompts = (
        Prompt(long, options.long_prompt, options.max_tokens),
        Prompt(short, options.short_prompt, max(1, options.max_tokens // 4)),
    )
    return tuple(prompt for prompt in prompts if prompt.text)


def _settings(options: RecaptionOptions) -> RecaptionSettings:
    """What a worker needs of the options, checked."""
    prompts = _prompts(options)
    if not prompts:
        raise UserError("--long-prompt, --short-prompt: both are empty; there is nothing to ask")
    if not options.name.isidentifier():
        raise UserError(f"--name: got {options.name!r}; it becomes part of a column's name: give letters and digits")
    if options.batch_size < 1 or options.max_tokens < 1 or options.retries < 0 or options.timeout <= 0:
        raise UserError(
            f"--batch-size, --max-tokens, --retries, --timeout: got {options.batch_size}, {options.max_tokens}, "
            f"{options.retries}, {options.timeout}; too small"
        )
    has_weights = bool(options.clip_weights) or Path(options.clip_model).is_dir()
    if options.keep_above is not None and not (-1 <= options.keep_above <= 1 and has_weights):
        raise UserError(
            f"--keep-above, --clip-model, --clip-weights: got {options.keep_above}, {options.clip_model!r}, "
            f"{options.clip_weights!r}; give a cosine from -1 to 1, and an open_clip folder, or a name and its weights"
        )
    return RecaptionSettings(
        output=Path(options.output),
        state=Path(options.output) / STATE,
        model=options.model,
        endpoint=options.endpoint,
        prompts=prompts,
        batch_size=options.batch_size,
        timeout=options.timeout,
        retries=options.retries,
        max_bad_fraction=options.max_bad_fraction,
        stale_minutes=options.stale_minutes,
        trust_remote_code=options.trust_remote_code,
        clip_model=options.clip_model,
        clip_weights=options.clip_weights,
        keep_above=options.keep_above,
        owner=f"ray:{options.ray}" if options.ray else "",
    )


def _caption_all(settings: RecaptionSettings, shards: list[Shard], ray_address: str) -> Counter[str]:
    """The shards one after another in this process, whose model they share, or as tasks on Ray."""
    samples = _samples(settings, shards)
    count, unit = (sum(samples.values()), "images") if samples else (len(shards), "shards")
    with Progress(f"recaption {settings.output}", count, unit) as progress:
        if ray_address:
            return _caption_on_ray(settings, shards, samples, progress, ray_address)
        return _caption_here(settings, shards, samples, progress)


def _caption_here(
    settings: RecaptionSettings, shards: list[Shard], samples: dict[str, int], progress: Progress
) -> Counter[str]:
    total: Counter[str] = Counter()

    def on_answers(counts: Counter[str]) -> None:
        total.update(counts)
        progress.advance(counts.total() if samples else 0, _told(total))

    task = ShardTask(settings, on_answers)
    for shard in shards:
        counts = task(shard)
        new = counts.pop("captioned", 0) + counts.pop("failed", 0)  # which on_answers has counted
        total.update(counts)
        if samples:
            progress.skip(max(0, samples.get(shard, 0) - new))
        elif counts["shards done"]:
            progress.advance()
        else:
            progress.skip(1)
    return total


def _caption_on_ray(
    settings: RecaptionSettings, shards: list[Shard], samples: dict[str, int], progress: Progress, address: str
) -> Counter[str]:
    """The same with a task a shard; how far the tasks are is read from the files that they write their answers to."""
    total: Counter[str] = Counter()
    counted: Counter[Path] = Counter()
    elsewhere = AnswersElsewhere(map(settings.answers, shards))

    def on_wait() -> None:
        new = elsewhere.count()
        counted.update(new)
        progress.advance(new.total() if samples else 0, _told(total))

    task = ShardTask(settings)
    results = map_tasks(
        lambda shard: (shard, task(shard)),
        shards,
        ray_address=address,
        gpus_if_any=0 if settings.endpoint else 1,
        on_wait=on_wait,
    )
    for shard, counts in results:
        total.update(counts)
        if samples:
            progress.skip(max(0, samples.get(shard, 0) - counted[settings.answers(shard)]))
        else:
            progress.advance()
    return total


def _samples(settings: RecaptionSettings, shards: list[Shard]) -> dict[str, int]:
    """Samples by shard where that costs little: in a manifest, or counted once of local files; else nothing."""
    if any(scheme_of(shard) != "file" for shard in shards):
        return indexed_samples(shards)
    return count_samples(shards, settings.state / "counts.json").samples


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def format_counts(counts: Counter[str]) -> str:
    """What a call did, as text to read."""
    order = ("shards done", "done before", "busy elsewhere", "captioned", "kept from before", "failed")
    return "\n".join(
        f"{counts[what]:>10} {what}" for what in order if counts[what] or what in ("shards done", "captioned")
    )
