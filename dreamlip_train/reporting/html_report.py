"""``dreamlip-train report``: one run as one HTML page that needs no other file, to mail or to archive."""

from __future__ import annotations

import base64
import html
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamlip_train.checkpoint.weights import load_for_eval
from dreamlip_train.config.schema import Config
from dreamlip_train.config.toml import read_config
from dreamlip_train.data.shards.shard_names import list_shards
from dreamlip_train.data.validation import val_samples
from dreamlip_train.evaluation.classification.multi_label import format_multi_label
from dreamlip_train.evaluation.classification.zero_shot import format_zero_shot
from dreamlip_train.evaluation.held_out import format_report
from dreamlip_train.evaluation.paper import paper_table
from dreamlip_train.evaluation.retrieval.retrieval_sets import format_retrieval
from dreamlip_train.evaluation.segmentation.segmentation import format_segmentation
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.reporting.retrieval_examples import Example, retrieval_examples

_STYLE = """
:root { --ink: #1f2933; --muted: #5f6c7b; --line: #e4e7eb; --good: #0b7a5b; --bad: #b3331f; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.25rem 4rem; color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem;
  border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p { margin: .4rem 0; }
.muted { color: var(--muted); } .scroll { overflow-x: auto; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem 2.2rem; margin: 1.2rem 0; } .facts div b { display: block;
  font-size: 1.5rem; line-height: 1.2; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { padding: .28rem .9rem .28rem 0;
  text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; border-bottom: 1px solid var(--line); }
  tr.paper td { color: var(--muted); }
img { max-width: 100%; } .example { display: grid; grid-template-columns: minmax(12rem, 20rem) 1fr;
  gap: .4rem 1.2rem; margin: 1rem 0; align-items: start; }
.strip { display: flex; gap: .5rem; flex-wrap: wrap; } figure { margin: 0; width: 104px; font-size: .78rem;
  color: var(--muted); }
figure img { width: 104px; height: 104px; border: 3px solid transparent; border-radius: 4px; display: block; }
figure.own img { border-color: var(--good); } figure.truth img { border-color: var(--bad); } 
details { margin: .6rem 0; } pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 640px) { .example { grid-template-columns: 1fr; } }
"""


def write_report(run: str | Path, output: str | Path = "", *, examples: int = 6) -> Path:
    """Write the page and return its path. What the run has no data for is said in its place, the rest is there.

    Raises:
        UserError: ``run`` is not a run folder with logged steps.
    """
    run = Path(run)
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"RUN: no file {run / 'metrics.jsonl'}; give a run folder of `dreamlip-train train`")
    output = Path(output) if output else run / "report.html"
    summary = (
        json.loads((run / "summary.json").read_text()) if (run / "summary.json").is_file() else _last_evaluation(run)
    )
    model, _ = load_for_eval(run)
    config = read_config(run / "config.toml")  # a reader may have corrected where the shards are by now
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    evaluations = _evaluations(run)
    sections = [
        _header(run, config, summary),
        _section("Training", lambda: _curves(run)),
        _section("Retrieval", lambda: _retrieval(summary)),
        *([_section("Evaluations", lambda: evaluations)] if evaluations else []),
        _section("Patch localization", lambda: _localization(summary)),
        _section("Where sub-captions look", lambda: _grouping(model, config)),
        _section("Retrieval, right and wrong", lambda: _examples(model, config, device, examples)),
        _section("Data", lambda: _data(config)),
        _section("Settings and versions", lambda: _settings(run, summary)),
    ]
    title = f"{html.escape(run.absolute().name)} - DreamLIP run"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    partial = output.with_name(output.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(output)
    return output


def _last_evaluation(run: Path) -> dict[str, Any]:
    """The last held-out numbers of a run that has no summary yet."""
    rows = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a line cut off by a crash
            continue
    evaluated = [row for row in rows if "retrieval" in row]
    return (evaluated[-1] if evaluated else {}) | {"steps": rows[-1]["step"] if rows else 0}


def _section(title: str, content: Callable[[], str]) -> str:
    try:
        inside = content()
    except (ValueError, OSError) as error:
        inside = f'<p class="muted">Not shown: {html.escape(str(error))}</p>'
    return f"<section><h2>{title}</h2>{inside}</section>"


def _header(run: Path, config: Config, summary: dict[str, Any]) -> str:
    facts = {"steps": f"{summary.get('steps', 0):,}"}
    if "seconds" in summary:
        hours = summary["seconds"] / 3600
        facts["hours" if hours >= 1 else "minutes"] = f"{hours:.1f}" if hours >= 1 else f"{60 * hours:.1f}"
    facts |= {
        "images a step": f"{config.train.global_batch_size:,}",
        "sub-captions an image": str(config.data.num_sub_captions),
    }
    if "retrieval" in summary:
        recall = summary["retrieval"]["long_caption"]
        facts |= {
            "R@1, text to image": f"{recall['t2i']['r_at_1']:.1f} %",
            "R@1, image to text": f"{recall['i2t']['r_at_1']:.1f} %",
        }
    cells = "".join(f"<div><b>{value}</b><span class='muted'>{name}</span></div>" for name, value in facts.items())
    losses = f"contrastive {config.loss.mpcl_weight:g} + grouping {config.loss.grouping_weight:g}"
    return (
        f"<header><h1>{html.escape(run.absolute().name)}</h1><p class='muted'>DreamLIP, "
        f"{html.escape(config.model.name)}, losses: {losses}</p>"
        f'<div class="facts">{cells}</div></header>'
    )


def _curves(run: Path) -> str:
    from dreamlip_train.reporting.curves import plot_curves

    with tempfile.TemporaryDirectory() as folder:
        plot_curves(run / "metrics.jsonl", Path(folder) / "curves.png")
        return _png(
            Path(folder) / "curves.png",
            "Loss, held-out recall, learning rate, logit scales, throughput and waiting for data over the steps",
        )


def _retrieval(summary: dict[str, Any]) -> str:
    if "retrieval" not in summary:
        raise UserError("the run was not evaluated; train with data.val_shards")
    rows = []
    for kind, label in (("long_caption", "long caption"), ("sentence", "single sentence")):
        scores = summary["retrieval"][kind]
        for way, arrow in (("t2i", "text to image"), ("i2t", "image to text")):
            cells = [
                f"{scores[way][k]:.1f} <span class='muted'>({scores['chance'][way][k]:.1f})</span>"
                for k in ("r_at_1", "r_at_5", "r_at_10")
            ]
            rows.append([f"{label}, {arrow}", *cells])
    ours = _table(["held out, % (chance)", "R@1", "R@5", "R@10"], rows)
    columns = ("i2t_flickr30k_r1", "i2t_mscoco_r1", "t2i_flickr30k_r1", "t2i_mscoco_r1")
    paper_rows = [
        [f"{row['data']}, {row['method']}", *(row[column] for column in columns)]
        for row in paper_table("table1_retrieval_vitb32")
    ]
    theirs = _table(["R@1, ViT-B/32", "Flickr30k i2t", "COCO i2t", "Flickr30k t2i", "COCO t2i"], paper_rows, paper=True)
    return (
        f"<p>{summary['samples']:,} held-out images, {summary['sentences']:,} sentences.</p>{ours}"
        "<p class='muted'>The paper's Table 1, on other images and captions: comparable only with "
        f"<code>dreamlip-train eval retrieval-set</code> on the same sets.</p>{theirs}"
    )


def _localization(summary: dict[str, Any]) -> str:
    located = summary.get("localization")
    if not located:
        raise UserError("the held-out samples have no masks")
    names = {
        "mass_inside": "weight inside the region",
        "pointing": "top patch inside the region",
        "miou": "IoU of the selected patches",
    }
    rows = [[label, f"{located[name]['value']:.1f}", f"{located[name]['chance']:.1f}"] for name, label in names.items()]
    return f"<p>{located['sub_captions']:,} sub-captions with a region.</p>" + _table(["%", "this run", "chance"], rows)


_FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "retrieval": format_report,
    "retrieval-set": format_retrieval,
    "zeroshot": format_zero_shot,
    "multilabel": format_multi_label,
    "segment": format_segmentation,
}


def _evaluations(run: Path) -> str:
    """What ``eval --output`` wrote into the run folder, as it was printed; "" where there is nothing."""
    parts = []
    for path in sorted(run.glob("*.json")) + sorted(run.glob("eval*/*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            told = content.pop("evaluation")
            text = _FORMATS[told["command"]](content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # another file
        of = told.get("annotations") or told.get("layout") or told.get("val_shards") or told.get("root") or ""
        title = html.escape(f"{told['command']} {of}")
        parts.append(f"<h3>{title}</h3><pre>{html.escape(text)}</pre>")
    return "".join(parts)


def _grouping(model: Any, config: Config) -> str:
    from dreamlip_train.reporting.grouping_figure import plot_grouping

    with tempfile.TemporaryDirectory() as folder:
        samples = val_samples(config.data, image_size=model.image_size)
        picture = Path(folder) / "grouping.png"
        plot_grouping(model, samples, picture, **config.selection())
        return (
            "<p class='muted'>Held-out pictures; the patches each sub-caption selects are lit, "
            "outlines are the regions it describes.</p>"
            + _png(picture, "Held-out pictures with the patches that each sub-caption selects")
        )


def _examples(model: Any, config: Config, device: torch.device, count: int) -> str:
    right, wrong = retrieval_examples(model, config.data, device, count=count)
    if not right and not wrong:
        raise UserError("no held-out sample has a sentence")
    parts = []
    for title, found in (("Found first, most surely", right), ("Missed furthest", wrong)):
        parts.append(f"<h3>{title}</h3>" + ("".join(_example(one) for one in found) or "<p class='muted'>None.</p>"))
    return "".join(parts)


def _example(one: Example) -> str:
    figures = []
    for place, (picture, cosine, own) in enumerate(one.found, 1):
        style, alt = ("own", "its own picture") if own else ("", "another picture")
        figures.append(
            f'<figure class="{style}"><img alt="{alt}" src="{_jpeg(picture)}">{place}. cosine {cosine:.2f}</figure>'
        )
    if one.rank > len(one.found):
        figures.append(
            f'<figure class="truth"><img alt="its own picture" src="{_jpeg(one.picture)}">its own: {one.rank}.</figure>'
        )
    return f'<div class="example"><p>{html.escape(one.caption)}</p><div class="strip">{"".join(figures)}</div></div>'


def _data(config: Config) -> str:
    rows, columns = [], {}
    for name, pattern in (("training", config.data.shards), ("held out", config.data.val_shards)):
        if not pattern:
            continue
        shards = list_shards(pattern, allow_pipe=False, field=name)
        manifest = Path(shards[0]).parent / "manifest.json"
        content = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        rows.append(
            [
                name,
                f"{len(shards):,}",
                f"{content['samples']:,}" if "samples" in content else "not counted",
                html.escape(pattern),
            ]
        )
        if name == "training":
            columns = content.get("captions", {})
    text = _table(["shards", "files", "samples", "pattern"], rows)
    if columns:
        cells = [
            [
                html.escape(column),
                *(
                    f"{numbers.get(key, 0):,.1f}".removesuffix(".0")
                    for key in ("samples", "sentences_mean", "tokens_mean")
                ),
            ]
            for column, numbers in columns.items()
        ]
        text += _table(["captions of the training shards", "captions", "sentences each", "tokens each"], cells)
    sources = ", ".join(config.data.caption_sources) or "every caption column"
    return (
        text + f"<p>Drawn from {html.escape(sources)}: {config.data.num_sub_captions} sub-captions per image, "
        f"{config.data.sampling}.</p>"
    )


def _settings(run: Path, summary: dict[str, Any]) -> str:
    versions = summary.get("versions", {})
    rows = [[html.escape(str(name)), html.escape(str(value))] for name, value in versions.items()]
    backends = ", ".join(f"{op}: {backend}" for op, backend in summary.get("backends", {}).items())
    toml = html.escape((run / "config.toml").read_text(encoding="utf-8"))
    return (
        f"<p>{html.escape(summary.get('device', ''))} x {summary.get('ranks', 1)}; backends {html.escape(backends)}</p>"
        + (_table(["package", "version"], rows) if rows else "")
        + f"<details><summary>config.toml</summary><pre>{toml}</pre></details>"
    )


def _table(head: list[str], rows: list[list[str]], paper: bool = False) -> str:
    lines = "".join(
        f"<tr{' class=paper' if paper else ''}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
    )
    first = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{lines}</tbody></table></div>'


def _png(path: Path, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _jpeg(image_CHW: Tensor) -> str:
    buffer = io.BytesIO()
    picture = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    picture.thumbnail((208, 208))
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
