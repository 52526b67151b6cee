"""``dreamlip-train report``: one run as one HTML page that needs no other file, to mail or to archive."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor

from dreamlip_train.checkpoint.weights import load_for_eval
from dreamlip_train.config.schema import Config
from dreamlip_train.config.toml import read_config
from dreamlip_train.data.shards.manifest import MANIFEST
from dreamlip_train.data.shards.shard_names import list_shards
from dreamlip_train.data.validation import val_samples
from dreamlip_train.evaluation.comparison import Comparison, comparisons, read_results
from dreamlip_train.evaluation.formats import FORMATS
from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.atomic_json import read_json, read_json_lines
from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.reporting.retrieval_examples import Example, retrieval_examples

_PAGE = Path(__file__).parent / "run_page"
Content = dict[str, Any]
"""What run_page/page.html shows of a section, or {"missing": why there is nothing}."""


def write_report(
    run: str | Path, output: str | Path = "", *, examples: int = 6, results: Sequence[str | Path] = ()
) -> Path:
    """Write the page and return its path. What the run has no data for is named in its place, the rest is there.

    Args:
        results: files, or folders of files, that `eval --output` wrote elsewhere than in the run folder.

    Raises:
        UserError: ``run`` is not a run folder with logged steps, or one of ``results`` is not there.
    """
    run = Path(run)
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"RUN: no file {run / 'metrics.jsonl'}; give a run folder of `dreamlip-train train`")
    output = Path(output) if output else run / "report.html"
    files = result_files(run, results)
    rows = list(read_json_lines(run / "metrics.jsonl"))
    summary = read_json(run / "summary.json") if (run / "summary.json").is_file() else _last_evaluation(rows)
    model, _ = load_for_eval(run)
    config = read_config(run / "config.toml")  # a reader may have corrected where the shards are by now
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    page = render_page(
        name=run.absolute().name,
        config=config,
        facts=_facts(config, summary),
        training=_content(lambda: _training(run)),
        retrieval=_content(lambda: _retrieval(summary)),
        evaluations=evaluations_of(files),
        tables=tables_of(files),
        localization=_content(lambda: _localization(summary)),
        grouping=_content(lambda: _grouping(model, config)),
        examples=_content(lambda: _examples(model, config, device, examples)),
        data=_content(lambda: _data(config)),
        settings=_content(lambda: _settings(run, summary)),
    )
    with atomic_write(output) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
    return output


def render_page(**content: Any) -> str:
    """run_page/page.html filled in; every text is escaped."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE),
        autoescape=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return templates.get_template("page.html").render(content)


def _last_evaluation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last held-out numbers of a run that has no summary yet."""
    evaluations = [row for row in rows if "retrieval" in row]
    return (evaluations[-1] if evaluations else {}) | {"steps": rows[-1].get("step", 0) if rows else 0}


def _content(make: Callable[[], Content]) -> Content:
    try:
        return make()
    except (ValueError, OSError) as error:
        return {"missing": str(error)}


def _facts(config: Config, summary: dict[str, Any]) -> dict[str, str]:
    """The large numbers under the title."""
    facts = {"steps": f"{summary.get('steps', 0):,}"}
    if "seconds" in summary:
        hours = summary["seconds"] / 3600
        facts["hours" if hours >= 1 else "minutes"] = f"{hours:.1f}" if hours >= 1 else f"{60 * hours:.1f}"
    facts["images per step"] = f"{config.train.global_batch_size:,}"
    facts["sub-captions per image"] = str(config.data.num_sub_captions)
    if "retrieval" in summary:
        for way, label in (("t2i", "text to image"), ("i2t", "image to text")):
            facts[f"R@1, {label}"] = f"{summary['retrieval']['long_caption'][way]['r_at_1']:.1f} %"
    return facts


def _training(run: Path) -> Content:
    from dreamlip_train.reporting.curves import plot_curves

    return {"picture": _drawn(lambda png: plot_curves(run / "metrics.jsonl", png))}


def _retrieval(summary: dict[str, Any]) -> Content:
    if "retrieval" not in summary:
        raise UserError("the run was not evaluated; train with data.val_shards")
    rows = []
    for kind, label in (("long_caption", "long caption"), ("sentence", "single sentence")):
        scores = summary["retrieval"][kind]
        for way, arrow in (("t2i", "text to image"), ("i2t", "image to text")):
            cells = [(scores[way][k], scores["chance"][way][k]) for k in ("r_at_1", "r_at_5", "r_at_10")]
            rows.append((f"{label}, {arrow}", cells))
    return {"samples": summary["samples"], "sentences": summary["sentences"], "rows": rows}


def _localization(summary: dict[str, Any]) -> Content:
    scores = summary.get("localization")
    if not scores:
        raise UserError("the held-out samples have no masks")
    names = {
        "mass_inside": "weight inside the region",
        "pointing": "top patch inside the region",
        "miou": "IoU of the selected patches",
    }
    rows = [[label, f"{scores[name]['value']:.1f}", f"{scores[name]['chance']:.1f}"] for name, label in names.items()]
    return {"sub_captions": scores["sub_captions"], "rows": rows}


def result_files(run: Path, more: Sequence[str | Path] = ()) -> list[Path]:
    """The json files of a run folder and its eval* folders, then ``more`` files and those of ``more`` folders."""
    files = sorted(run.glob("*.json")) + sorted(run.glob("eval*/*.json"))
    for path in map(Path, more):
        if not path.exists():
            raise UserError(f"--results: no file or folder {str(path)!r}; give what `eval --output` wrote")
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return files


def evaluations_of(files: Sequence[Path]) -> list[tuple[str, str]]:
    """(title, text as it was printed) of those of ``files`` that ``eval --output`` wrote."""
    evaluations = []
    for path in files:
        try:
            content = read_json(path)
            evaluation = content.pop("evaluation")
            text = FORMATS[evaluation["command"]](content)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # another file
        of = (evaluation.get(name) for name in ("annotations", "layout", "set", "val_shards", "datasets", "root"))
        evaluations.append((f"{evaluation['command']} {next(filter(None, of), '')}", text))
    return evaluations


def tables_of(files: Sequence[Path]) -> list[Comparison]:
    """The paper's tables and those of later work, with what ``files`` measured in them."""
    return comparisons(read_results(files))


def _grouping(model: Any, config: Config) -> Content:
    from dreamlip_train.reporting.grouping_figure import plot_grouping

    samples = val_samples(config.data, image_size=model.image_size)
    return {"picture": _drawn(lambda png: plot_grouping(model, samples, png, **config.selection()))}


def _examples(model: Any, config: Config, device: torch.device, count: int) -> Content:
    right, wrong = retrieval_examples(model, config.data, device, count=count)
    if not right and not wrong:
        raise UserError("no held-out sample has a sentence")
    groups = (("Found first, most surely", right), ("Missed furthest", wrong))
    return {"groups": [(title, [_example(one) for one in group]) for title, group in groups]}


def _example(one: Example) -> Content:
    pictures = [
        {"image": _jpeg(picture), "kind": "own" if own else "other", "label": f"{place}. cosine {cosine:.2f}"}
        for place, (picture, cosine, own) in enumerate(one.nearest, 1)
    ]
    if one.rank > len(one.nearest):
        pictures.append({"image": _jpeg(one.picture), "kind": "truth", "label": f"its own: {one.rank}."})
    return {"caption": one.caption, "pictures": pictures}


def _data(config: Config) -> Content:
    sets, captions = [], []
    for name, pattern in (("training", config.data.pattern), ("held out", config.data.val_shards)):
        if not pattern:
            continue
        shards = list_shards(pattern, allow_pipe=False, field=name)
        manifest = Path(shards[0]).parent / MANIFEST
        content = read_json(manifest) if manifest.is_file() else {}
        samples = f"{content['samples']:,}" if "samples" in content else "not counted"
        sets.append([name, f"{len(shards):,}", samples, pattern])
        if name == "training":
            for column, numbers in content.get("captions", {}).items():
                cells = (numbers.get(key, 0) for key in ("samples", "sentences_mean", "tokens_mean"))
                captions.append([column, *(f"{number:,.1f}".removesuffix(".0") for number in cells)])
    return {"sets": sets, "captions": captions}


def _settings(run: Path, summary: dict[str, Any]) -> Content:
    return {
        "device": f"{summary['device']} x {summary.get('ranks', 1)}" if "device" in summary else "device unknown",
        "backends": ", ".join(f"{op}: {backend}" for op, backend in summary.get("backends", {}).items()),
        "versions": list(summary.get("versions", {}).items()),
        "toml": (run / "config.toml").read_text(encoding="utf-8"),
    }


def _drawn(draw: Callable[[Path], None]) -> str:
    """What ``draw`` writes to a PNG file, as a data URL."""
    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder) / "picture.png"
        draw(png)
        return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def _jpeg(image_CHW: Tensor) -> str:
    buffer = io.BytesIO()
    picture = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    picture.thumbnail((208, 208))
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
