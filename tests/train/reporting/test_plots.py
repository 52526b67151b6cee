"""Pictures are drawn, are not blank, and show the numbers and patches they are given."""

import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from planted import PlantedModel, planted_sample

from dreamlip_train import cli
from dreamlip_train.ablation.plot import plot_ablation
from dreamlip_train.reporting import grouping_figure
from dreamlip_train.reporting.caption_histograms import plot_histograms
from dreamlip_train.reporting.curves import plot_curves, plot_runs
from dreamlip_train.reporting.grouping_figure import plot_grouping
from dreamlip_train.reporting.style import STYLE


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


def metrics(path, steps, loss=lambda s: 5 - s / 100):
    rows = [
        {
            "step": s,
            "epoch": 0,
            "loss": loss(s),
            "contrastive_loss": loss(s) - 1,
            "grouping_loss": 1.0,
            "logit_scale": 14.3,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "images_per_s": 100 + s,
            "data_wait": 0.1,
            "memory": 1.0,
        }
        for s in steps
    ]
    scores = {way: {"r_at_1": 12.0, "r_at_5": 30.0, "r_at_10": 50.0} for way in ("t2i", "i2t")}
    rows.append({"step": steps[-1], "retrieval": {"long_caption": scores, "sentence": scores}})
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 99, "los')  # a crash cut the last line
    return path


def test_curves(tmp_path):
    plot_curves(metrics(tmp_path / "a.jsonl", range(10, 200, 10)), tmp_path / "a.png")
    plot_curves(metrics(tmp_path / "b.jsonl", range(10, 200, 10), loss=lambda s: 5.0), tmp_path / "b.png")
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert min(a.shape[:2]) > 300 and a.std() > 10
    assert a.shape == b.shape and np.abs(a - b).max() > 50, "another loss draws another curve"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, open to look into."""
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    plt.close("all")


def test_each_loss_has_a_scale_of_its_own(tmp_path, figures):
    """A grouping loss that fell by a hundredth was a flat line under the contrastive loss."""
    rows = [
        {"step": s, "loss": 9 - s, "contrastive_loss": 8 - s, "grouping_loss": 1 - s / 100, "lr": 0.1} for s in range(5)
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_curves(tmp_path / "m.jsonl", tmp_path / "m.png")
    spans = {axis.get_title(loc="left"): axis.get_ylim() for axis in figures[0].axes}
    for title, low, high in (("Loss", 5, 9), ("Contrastive loss", 4, 8), ("Grouping loss", 0.96, 1)):
        bottom, top = spans[title]
        assert low - 0.2 * (high - low) < bottom < low < high < top < high + 0.2 * (high - low), title
    assert spans["Learning rate"][0] == 0
    assert all(tick == int(tick) for axis in figures[0].axes for tick in axis.get_xticks())


def test_seven_sources_have_seven_colors_and_whole_numbers_of_sub_captions(tmp_path, figures):
    kinds = {kind: Counter({1: 3, 2: 2}) for kind in ("sub_captions", "tokens", "sub_caption_tokens")}
    plot_histograms({f"long{number}_captions": kinds for number in range(7)}, tmp_path / "captions.png")
    for axis in figures[0].axes:
        assert len({line.get_color() for line in axis.lines}) == 7
        assert all(tick == int(tick) for tick in axis.get_xticks())


def test_an_ablation_is_labeled_in_words(tmp_path, figures):
    scores = dict.fromkeys(("long", "whole", "short", "sentence", "pointing", "miou"), 10.0)
    plot_ablation({"runs": {"raw": {0: scores}, "k1": {0: scores}}, "chance": {}}, tmp_path / "ablation.png")
    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert labels == ["raw caption only (CLIP)", "K = 1, no grouping loss"]


def test_curves_without_a_step_is_a_clear_error(tmp_path):
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no line with a step"):
        plot_curves(tmp_path / "m.jsonl", tmp_path / "m.png")


def test_grouping_lights_the_patches_that_are_selected(tmp_path):
    samples = [planted_sample(seed) for seed in range(3)]
    plot_grouping(PlantedModel(), iter(samples), tmp_path / "right.png", threshold=0.6)
    plot_grouping(PlantedModel(mirrored=True), iter(samples), tmp_path / "mirrored.png", threshold=0.6)
    right, mirrored = pixels(tmp_path / "right.png"), pixels(tmp_path / "mirrored.png")
    assert right.shape == mirrored.shape and right.std() > 20
    assert np.abs(right - mirrored).mean() > 1, "another selection is another picture"


def test_grouping_without_sentences_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="sentence"):
        plot_grouping(PlantedModel(), iter([{**planted_sample(0), "sentences": []}]), tmp_path / "x.png")


def test_runs_are_compared_in_one_picture(tmp_path, capsys):
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / name).mkdir()
        rows = [
            {"step": step, "loss": 3.0 / (step + number + 1), "lr": 1e-3, "images_per_s": 10.0 + number}
            for step in range(20)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli.main(["plot", *(str(tmp_path / name) for name in "abc"), "--output", str(tmp_path / "out.png")])
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(2**24)) > 50
    for words, message in (([str(tmp_path / "none")], "RUN...: no file"), ([], "RUN...: give at least one run folder")):
        with pytest.raises(SystemExit):
            cli.main(["plot", *words])
        assert message in capsys.readouterr().err
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit):
        cli.main(["plot", str(tmp_path / "a")])
    assert "has no line with a step" in capsys.readouterr().err


def test_user_text_is_never_mathematics(tmp_path):
    r"""A caption with "$\frac{$" once ended a run at its last picture; "_name" is left out of a legend by
    matplotlib.
    """
    hostile = r"costs $\frac{$ and $x_{$"
    plot_runs({hostile: metrics(tmp_path / "a.jsonl", [1, 2])}, tmp_path / "runs.png")
    kinds = {kind: Counter({3: 2}) for kind in ("sub_captions", "tokens", "sub_caption_tokens")}
    plot_histograms({f"{hostile}_captions": kinds}, tmp_path / "captions.png")
    sample = planted_sample(0, objects=2) | {"raw": hostile}
    sample["sentences"] = [hostile for _ in sample["sentences"]]
    with plt.rc_context(STYLE):
        figure = grouping_figure._draw_rows([sample], [torch.full((2, 64), 1 / 64)], (8, 8))
        figure.savefig(tmp_path / "grouping.png")
    for name in ("runs", "captions", "grouping"):
        assert pixels(tmp_path / f"{name}.png").std() > 1


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(tmp_path):
    ink = []
    kinds = {kind: Counter({3: 2}) for kind in ("sub_captions", "tokens", "sub_caption_tokens")}
    for name in ("hello_captions", "_hell_captions"):
        plot_histograms({name: kinds}, tmp_path / "captions.png")
        ink.append(int((pixels(tmp_path / "captions.png") < 100).sum()))
    assert abs(ink[1] - ink[0]) < 0.1 * ink[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib says which label it leaves out
        plot_runs(
            {"_a": metrics(tmp_path / "a.jsonl", [1, 2]), "b": metrics(tmp_path / "b.jsonl", [1, 2])},
            tmp_path / "r.png",
        )
