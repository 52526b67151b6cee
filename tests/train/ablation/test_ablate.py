"""The ablation: every variant is a config that can run, the verdicts follow from the numbers, and a real run of one
variant goes through and is kept.
"""

import json

import pytest

from dreamlip_train import cli
from dreamlip_train.ablation.grid import CLAIMS, VARIANTS, config_of
from dreamlip_train.ablation.options import AblationOptions
from dreamlip_train.ablation.plot import plot_ablation
from dreamlip_train.ablation.run import SCORES, ablate, format_ablation, judge
from dreamlip_train.config.recipes import demo
from dreamlip_train.config.toml import format_config, read_config


def test_every_variant_is_a_valid_config_that_survives_its_file(tmp_path):
    seen = {}
    for variant in VARIANTS:
        config = config_of(variant, train="t", val="v", seed=1, steps=300, batch_size=64)
        (tmp_path / "c.toml").write_text(format_config(config))
        assert read_config(tmp_path / "c.toml", demo()).to_dict() == config.to_dict(), (
            "what is trained is what the grid says"
        )
        seen[variant.name] = format_config(config)
    k4 = [name for name, text in seen.items() if list(seen.values()).count(text) > 1]
    assert not k4, f"these are one experiment: {k4}"
    names = {variant.name for variant in VARIANTS}
    assert all({claim.better, claim.worse} <= names and claim.score in SCORES for claim in CLAIMS)


def scores(value, **changes):
    return dict.fromkeys(SCORES, value) | changes


def test_verdicts_need_two_seeds_and_a_clear_difference():
    made = {
        "raw": {0: scores(5.0), 1: scores(6.0)},
        "raw-short": {0: scores(25.0), 1: scores(27.0)},
        "long-direct": {0: scores(1.0), 1: scores(2.0)},
        "long-sampled": {0: scores(1.2), 1: scores(1.9)},
        "k1": {0: scores(1.0)},
        "k2": {0: scores(9.0)},
    }
    found = {(claim["better"], claim["worse"], claim["score"]): claim for claim in judge(made)}
    assert (
        found["raw-short", "raw", "short"]["verdict"] == "holds"
        and found["raw-short", "raw", "short"]["difference"] == 20.5
    )
    assert found["long-direct", "raw", "long"]["verdict"] == "contradicted"
    assert found["long-sampled", "long-direct", "long"]["verdict"] == "not resolved"
    assert found["k2", "k1", "long"]["verdict"] == "not resolved" and found["k2", "k1", "long"]["seeds"] == 1
    assert ("full", "long-short", "long") not in found


def test_the_table_and_the_plot(tmp_path):
    made = {variant.name: {0: scores(10.0, long=3.0), 1: scores(12.0, long=5.0)} for variant in VARIANTS}
    content = {"settings": {"steps": 3}, "runs": made, "chance": {"long": 0.25}, "claims": judge(made)}
    table = format_ablation(content)
    assert "| full | the same and the grouping loss (DreamLIP) | 2 | 11.0 ± 1.4" in table and "| 4.0 ± 1.4 |" in table
    plot_ablation(content, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


SMALL = {"only": ("full",), "seeds": 1, "steps": 2, "batch_size": 8, "num_train": 24, "num_val": 12}


def test_a_real_run_is_trained_judged_and_kept(tmp_path, capsys):
    words = [
        word
        for name, value in SMALL.items()
        for word in (f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [str(value)]))
    ]
    cli.main(["ablate", "--output", str(tmp_path / "ab"), *words])
    assert "| full |" in capsys.readouterr().out
    content = json.loads((tmp_path / "ab" / "ablation.json").read_text())
    run = tmp_path / "ab" / "runs" / "full-seed0"
    assert set(content["runs"]["full"]["0"]) == set(SCORES) and content["chance"]["long"] == pytest.approx(100 / 12)
    assert (tmp_path / "ab" / "ablation.png").is_file() and (run / "summary.json").is_file()
    before = (run / "summary.json").stat().st_mtime_ns
    assert ablate(AblationOptions(str(tmp_path / "ab"), **SMALL))["runs"]["full"][0] == content["runs"]["full"]["0"], (
        "a finished run is not trained again"
    )
    assert (run / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds an ablation with steps=2; give those settings"):
        ablate(AblationOptions(str(tmp_path / "ab"), **(SMALL | {"steps": 3})))


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_are_kept(tmp_path):
    run = tmp_path / "ab" / "runs" / "full-seed0"
    run.mkdir(parents=True)
    (run / "checkpoints").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"1 of 1 runs failed; .*\n  full, seed 0: exit code \d+; see .*output.txt"):
        ablate(AblationOptions(str(tmp_path / "ab"), **SMALL))
    assert (run / "output.txt").stat().st_size > 0


def test_an_unknown_variant_and_count_are_named(tmp_path):
    with pytest.raises(ValueError, match="--only: no variant 'fulll'; there are raw, "):
        ablate(AblationOptions(str(tmp_path), only=("fulll",)))
    with pytest.raises(ValueError, match="--num-train: got 0"):
        ablate(AblationOptions(str(tmp_path), num_train=0))
