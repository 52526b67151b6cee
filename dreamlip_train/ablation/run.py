"""The paper's ablations in miniature: a grid of recipes on the built-in scenes, several seeds, one table and one plot.

Each run is `dreamlip-train train` in a process of its own, in a run folder of its own: started again, finished runs are
kept and others resume.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from dreamlip_train.ablation.grid import CLAIMS, LONG, RAW, SHORT, VARIANTS, Variant, config_of
from dreamlip_train.ablation.options import AblationOptions
from dreamlip_train.config.toml import format_config
from dreamlip_train.jobs.atomic_json import read_json, write_json
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import RunError, UserError

# What a run is judged by. Retrieval: R@1, mean of both directions, in percent; the rest: percent, steps a second.
SCORES = {
    "raw": "R@1 raw caption",
    "short": "R@1 short caption",
    "whole": "R@1 long caption as one text",
    "long": "R@1 long caption, mean of its sentences",
    "sentence": "R@1 single sentence",
    "mass_inside": "weight inside the region",
    "pointing": "top patch inside the region",
    "miou": "IoU of the selected patches",
    "steps_per_s": "steps/s",
}
_SELECTION = 0.5  # the threshold by which every model's patches are selected, whatever it was trained with
_TIMEOUT = 24 * 3600


def ablate(options: AblationOptions) -> dict[str, Any]:
    """Train every variant with every seed, evaluate each alike, and write ablation.{json,md,png} in ``options.output``.

    Returns:
        ablation.json's content: {"settings", "runs": {variant: {seed: scores}}, "chance", "claims"}.
    Raises:
        UserError: an unknown variant, a count below 1, or the folder holds an ablation with other settings.
        RunError: runs failed (their logs are named); those that finished are in the table.
    """
    variants, jobs = _variants(options.only), options.jobs
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "num_train", "num_val")}
    for name, value in settings.items() | {("seeds", options.seeds), ("jobs", jobs)}:
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')}: got {value}; give at least 1")
    folder = Path(options.output).absolute()
    _claim(folder, settings)
    train, val = _prepare_data(folder / "data", options.num_train, options.num_val)
    cells = [(variant, seed) for seed in range(options.seeds) for variant in variants]
    done: dict[tuple[str, int], dict[str, Any]] = {}
    failures: dict[tuple[str, int], str] = {}
    lock = threading.Lock()

    def one(cell: tuple[Variant, int]) -> None:
        variant, seed = cell
        run = folder / "runs" / f"{variant.name}-seed{seed}"
        config = config_of(variant, train=train, val=val, seed=seed, steps=options.steps, batch_size=options.batch_size)
        try:
            _train(run, format_config(config), max(1, len(os.sched_getaffinity(0)) // jobs))
            with lock:
                done[variant.name, seed] = _scores(run)
                write_results(folder, settings, _by_variant(variants, done))
        except (RuntimeError, ValueError, OSError, subprocess.TimeoutExpired) as error:
            failures[variant.name, seed] = str(error)
        progress.advance(text=f"{len(failures)} failed; last {run.name}")

    with Progress("ablate", len(cells), "runs") as progress, ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(one, cells))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # the runs got the signal too, and save
            raise
    if failures:
        causes = "\n".join(f"  {name}, seed {seed}: {why}" for (name, seed), why in failures.items())
        raise RunError(
            f"{len(failures)} of {len(cells)} runs failed; the others are in {folder / 'ablation.md'}:\n{causes}"
        )
    return write_results(folder, settings, _by_variant(variants, done))


def _variants(only: Sequence[str]) -> list[Variant]:
    by_name = {variant.name: variant for variant in VARIANTS}
    unknown = [name for name in only if name not in by_name]
    if unknown:
        raise UserError(f"--only: no variant {unknown[0]!r}; there are {', '.join(by_name)}")
    return [by_name[name] for name in only] if only else list(VARIANTS)


def _claim(folder: Path, settings: dict[str, int]) -> None:
    """Results of other settings must not meet in one table."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.is_file() and (old := read_json(path)) != settings:
        other_values = ", ".join(f"{name}={old.get(name)}" for name in settings if old.get(name) != settings[name])
        raise UserError(
            f"--output: {str(folder)!r} holds an ablation with {other_values}; give those settings or another folder"
        )
    write_json(path, settings)


def _prepare_data(data: Path, num_train: int, num_val: int) -> tuple[str, str]:
    """The scenes as shards: (training, held out)."""
    from dreamlip_train.model.tokenizer import count_tokens
    from dreamlip_train.prepare.folder import prepare_folder
    from dreamlip_train.prepare.scenes.scenes import prepare_scenes

    if not (data / "shards" / "val" / "manifest.json").is_file():
        prepare_scenes(data / "scenes", num_train, num_val)
        for split, masks in (("train", None), ("val", data / "scenes" / "val" / "masks")):
            scenes = data / "scenes" / split
            prepare_folder(
                scenes / "captions.csv",
                scenes / "images",
                data / "shards" / split,
                masks=masks,
                shard_size=100,
                count_tokens=count_tokens,
            )
    return str(data / "shards" / "train"), str(data / "shards" / "val")


def _train(run: Path, config: str, threads: int) -> None:
    """`dreamlip-train train` with this config, unless the run is finished; an interrupted one resumes."""
    if (run / "summary.json").is_file():
        return
    run.mkdir(parents=True, exist_ok=True)
    (run / "ablation.toml").write_text(config, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "dreamlip_train",
        "train",
        "demo",
        "--run-dir",
        str(run),
        "--config",
        str(run / "ablation.toml"),
    ]
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in group} | {
        "OMP_NUM_THREADS": str(threads)
    }
    with (run / "output.txt").open("a") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=_TIMEOUT
        ).returncode
    if code or not (run / "summary.json").is_file():
        raise RunError(f"exit code {code}; see {run / 'output.txt'}")


def _scores(run: Path) -> dict[str, Any]:
    """The run's SCORES and their chance levels, computed once and kept in the run folder."""
    path = run / "ablation.json"
    if path.is_file():
        return read_json(path)
    from dreamlip_train.checkpoint.weights import load_for_eval
    from dreamlip_train.evaluation.held_out import evaluate

    model, config = load_for_eval(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    scores: dict[str, Any] = {}
    chance: dict[str, float] = {}

    def by(source: str, splitter: str) -> dict[str, Any]:
        data = dataclasses.replace(config.data, eval_source=source, splitter=splitter)
        return evaluate(model, data, config.eval, device, threshold=_SELECTION)

    def recall(name: str, of: dict[str, Any]) -> None:
        scores[name] = mean(of[way]["r_at_1"] for way in ("t2i", "i2t"))
        chance[name] = mean(of["chance"][way]["r_at_1"] for way in ("t2i", "i2t"))

    for name, source in (("raw", RAW), ("short", SHORT), ("whole", LONG)):
        recall(name, by(source, "whole")["retrieval"]["sentence"])
    report = by(LONG, "sentence")
    recall("long", report["retrieval"]["long_caption"])
    recall("sentence", report["retrieval"]["sentence"])
    for name in ("mass_inside", "pointing", "miou"):
        scores[name], chance[name] = (report["localization"][name][part] for part in ("value", "chance"))
    summary = read_json(run / "summary.json")
    scores["steps_per_s"] = summary["steps"] / summary["seconds"]
    result = {"scores": scores, "chance": chance}
    write_json(path, result)
    return result


def _by_variant(
    variants: Sequence[Variant], done: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, dict[int, dict[str, Any]]]:
    """{variant: {seed: result}} in the grid's order, of the variants that have one."""
    rows = {
        variant.name: {seed: result for (name, seed), result in sorted(done.items()) if name == variant.name}
        for variant in variants
    }
    return {name: row for name, row in rows.items() if row}


def write_results(folder: Path, settings: dict[str, int], runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """ablation.json, ablation.md and ablation.png of what is there so far; returns the first."""
    from dreamlip_train.ablation.plot import plot_ablation

    scores = {name: {seed: result["scores"] for seed, result in row.items()} for name, row in runs.items()}
    chance = next(iter(runs.values()), {}).get(0, {}).get("chance", {})
    content = {"settings": settings, "runs": scores, "chance": chance, "claims": judge(scores)}
    write_json(folder / "ablation.json", content)
    (folder / "ablation.md").write_text(format_ablation(content) + "\n", encoding="utf-8")
    plot_ablation(content, folder / "ablation.png")
    return content


def judge(scores: dict[str, dict[int, dict[str, float]]]) -> list[dict[str, Any]]:
    """The paper's orderings against these runs: the mean difference over the seeds both have, paired by seed,
    its standard error, and a verdict.

    "holds" and "contradicted" need at least two seeds, a difference of two standard errors, and one larger than half a
    point; else "not resolved".
    """
    verdicts = []
    for claim in CLAIMS:
        better, worse = scores.get(claim.better, {}), scores.get(claim.worse, {})
        differences = [
            better[seed][claim.score] - worse[seed][claim.score] for seed in sorted(better.keys() & worse.keys())
        ]
        if not differences:
            continue
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
        difference = mean(differences)
        clear = error is not None and abs(difference) > max(2 * error, 0.5)
        verdict = ("holds" if difference > 0 else "contradicted") if clear else "not resolved"
        verdicts.append(
            dataclasses.asdict(claim)
            | {"difference": difference, "standard_error": error, "seeds": len(differences), "verdict": verdict}
        )
    return verdicts


def format_ablation(content: dict[str, Any]) -> str:
    """The table, mean and spread over the seeds, and the verdicts, as Markdown."""
    by_name = {variant.name: variant for variant in VARIANTS}
    settings = ", ".join(f"{name} {value}" for name, value in content["settings"].items())
    lines = [
        f"Ablation on the built-in scenes: {settings}. Mean over the seeds, ± their standard deviation. "
        f"Patches are selected at threshold {_SELECTION}.",
        "",
    ]
    lines += ["| variant | what | seeds | " + " | ".join(SCORES.values()) + " |", "|" + "---|" * (len(SCORES) + 3)]
    if content["chance"]:
        lines.append(
            "| *chance* | | | "
            + " | ".join(f"{content['chance'][name]:.1f}" if name in content["chance"] else "" for name in SCORES)
            + " |"
        )
    for name, row in content["runs"].items():
        cells = [_spread([scores[score] for scores in row.values()]) for score in SCORES]
        lines.append(f"| {name} | {by_name[name].what} | {len(row)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The paper's orderings, differences paired by seed:",
        "",
        "| claim | better | worse | score | difference | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for claim in content["claims"]:
        error = "" if claim["standard_error"] is None else f" ± {claim['standard_error']:.1f}"
        lines.append(
            f"| {claim['text']} | {claim['better']} | {claim['worse']} | {SCORES[claim['score']]} | "
            f"{claim['difference']:+.1f}{error} | {claim['verdict']} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
