"""The model card of an exported run: its data, recipe and numbers, its license, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamlip_train.config.schema import Config
from dreamlip_train.jobs.atomic_json import read_json

_PAPER = "https://arxiv.org/abs/2403.17007"
_TRANSFORMERS = """```python
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("{name}"), CLIPProcessor.from_pretrained("{name}")
```"""
_CARD = """# {title}

A {model} image-text model trained with DreamLIP ({paper}): language-image pre-training with long captions, whose
sentences are each a positive of their image and are grouped with the patches they are about.

## Load it

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{name}")
tokenizer = open_clip.get_tokenizer("hf-hub:{name}")
```

{transformers}

From a local copy: `local-dir:FOLDER` in place of `hf-hub:{name}`{local}. Texts are cut at {context_length} tokens.

## Data

{data}

## Recipe

{recipe}

## Numbers

{numbers}

## License

{license}
"""


def model_card(config: Config, run: Path | None, name: str, license: str, in_transformers: bool) -> str:
    """README.md of a repository on the Hugging Face Hub.

    Args:
        run: the run folder, whose summary.json and the JSON files of ``eval`` are read; None for a weights file.
        name: OWNER/NAME on the Hub.
        license: an identifier of the Hub, such as apache-2.0.
        in_transformers: whether the folder also holds transformers' CLIPModel.
    """
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        license=license,
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "dreamlip", *(["transformers"] if in_transformers else [])],
    )
    summary = _json(run / "summary.json") if run is not None else {}
    tables = [_table(("metric", "value"), list(_numbers(summary)), "Held-out samples of the training data's kind")]
    for path in _evaluations(run):
        rows = list(_numbers({key: value for key, value in _json(path).items() if key != "evaluation"}))
        tables.append(_table(("metric", "value"), rows, path.stem))
    return f"---\n{head.to_yaml()}\n---\n\n" + _CARD.format(
        title=name.split("/")[-1],
        name=name,
        paper=_PAPER,
        model=config.model.name,
        context_length=config.model.context_length,
        transformers=_TRANSFORMERS.format(name=name) if in_transformers else _NOT_IN_TRANSFORMERS,
        local=", or `from_pretrained(FOLDER)`" if in_transformers else "",
        data=_data(config, summary),
        recipe=_table(("setting", "value"), _recipe(config, summary), ""),
        numbers="\n\n".join(filter(None, tables)) or "No evaluation was stored with the run.",
        license=f"`{license}`" if license != "unknown" else "Not said by whoever exported it.",
    )


_NOT_IN_TRANSFORMERS = "transformers has no CLIPModel that pools as this one does: there are open_clip's files alone."


def _data(config: Config, summary: dict[str, Any]) -> str:
    if not config.data.shards:
        return "Not known: the weights came without a run."
    sources = ", ".join(config.data.caption_sources) or "all that a sample has"
    lines = [
        f"Shards `{Path(config.data.shards).parent.name}/{Path(config.data.shards).name}`",
        f"captions: {sources}, {config.data.num_sub_captions} sub-captions an image",
    ]
    if "steps" in summary:
        lines.append(f"{summary['steps'] * config.train.global_batch_size:,} samples seen")
    return "; ".join(lines) + "."


def _recipe(config: Config, summary: dict[str, Any]) -> list[tuple[str, str]]:
    if not config.data.shards:
        return []
    muon = config.optim.optimizer == "muon"
    parts = {
        "steps": summary.get("steps", config.train.steps or f"{config.train.epochs} epochs"),
        "batch size": config.train.global_batch_size,
        "precision": config.train.precision,
        "optimizer": f"Muon at {config.optim.muon_lr_scale:g} times the rate, and AdamW" if muon else "AdamW",
        "learning rate": f"{config.optim.lr:g}, {config.optim.schedule}, {config.optim.warmup_steps} steps of warm-up",
        "weight decay": f"{config.optim.weight_decay:g}",
        "contrast": f"{config.loss.mpcl_weight:g} x {config.loss.pairs}, negatives {config.loss.negatives}",
        "grouping": f"{config.loss.grouping_weight:g} x {config.loss.normalization}, contrast {config.loss.contrast}",
    }
    return [(name, str(value)) for name, value in parts.items()]


def _evaluations(run: Path | None) -> list[Path]:
    """What ``eval --output`` wrote into the run folder."""
    if run is None:
        return []
    return [
        path for path in (*sorted(run.glob("*.json")), *sorted(run.glob("eval*/*.json"))) if "evaluation" in _json(path)
    ]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _numbers(content: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Its floats, under the path of their keys; counts, times and what chance gives are no results."""
    rows = []
    for key, value in content.items():
        if isinstance(value, dict) and key != "chance":
            rows += _numbers(value, f"{before}{key} ")
        elif isinstance(value, float) and key not in ("chance", "seconds"):
            rows.append((f"{before}{key}", f"{value:.2f}"))
    return rows


def _table(head: tuple[str, str], rows: list[tuple[str, str]], title: str) -> str:
    if not rows:
        return "" if title else "Not known."
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [head, *rows]]
    lines.insert(1, "|---|---|")
    return "\n".join([*([f"{title}:", ""] if title else []), *lines])
