"""export --to hub: one folder that open_clip and transformers both load, with a card that says what the run was."""

import huggingface_hub
import pytest
from tiny import TOWERS, run_steps, tiny_config, tiny_engine

from dreamlip_train import cli
from dreamlip_train.checkpoint.interoperability.export import export_checkpoint
from dreamlip_train.checkpoint.interoperability.hub import upload
from dreamlip_train.checkpoint.saving import save
from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.jobs.user_error import UserError


def run_of(folder, config, steps=1):
    engine = tiny_engine(config)
    run_steps(engine, config, 0, steps)
    save(engine, folder / "checkpoints", config, TrainState(step=steps))
    return folder


def test_a_folder_for_both_libraries_with_the_runs_numbers(tmp_path, capsys):
    config = tiny_config()
    config.data.shards, config.train.global_batch_size = "/somewhere/secret/cc3m/{00000..00009}.tar", 16
    run = run_of(tmp_path / "run", config)
    recall = {"i2t": {"r_at_1": 41.25}, "t2i": {"r_at_1": 40.5}}
    write_json(run / "summary.json", {"steps": 7, "seconds": 3.5, "retrieval": {"sentence": recall, "chance": 0.5}})
    write_json(run / "coco.json", {"evaluation": {"command": "retrieval"}, "i2t": {"r_at_5": 12.5}})
    write_json(run / "other.json", {"i2t": {"r_at_5": 99.0}})
    words = ["--to", "hub", "--output", str(tmp_path / "hub"), "--license", "cc-by-nc-4.0"]
    cli.main(["export", str(run), *words])
    assert "loaded back, image features differ by" in capsys.readouterr().out  # by open_clip and by transformers
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert names >= {"README.md", "open_clip_config.json", "open_clip_model.safetensors", "config.json"}
    assert names >= {"model.safetensors", "tokenizer_config.json", "preprocessor_config.json"}
    card = huggingface_hub.ModelCard.load(tmp_path / "hub" / "README.md")
    card_data = card.data.to_dict()
    assert card_data["license"] == "cc-by-nc-4.0" and card_data["pipeline_tag"] == "zero-shot-image-classification"
    for part in (
        "retrieval sentence i2t r_at_1 | 41.25",
        "coco:",
        "i2t r_at_5 | 12.50",
        "112 samples seen",
        "`cc3m/{00000..00009}.tar`",
        'create_model_and_transforms("hf-hub:hub")',
        'CLIPModel.from_pretrained("hub")',
    ):
        assert part in card.text, part
    for part in ("secret", "99.00", "3.50", "chance"):
        assert part not in card.text, part


def test_a_model_that_transformers_has_not_is_for_open_clip_alone(tmp_path):
    config = tiny_config()
    config.model.config = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "pool_type": "avg"}}
    difference = export_checkpoint(run_of(tmp_path / "run", config), tmp_path / "hub", "hub", repository="lab/tiny")
    assert max(difference.values()) <= 1e-5 and not (tmp_path / "hub" / "config.json").exists()
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "CLIPModel that pools" in text and "hf-hub:lab/tiny" in text and "No evaluation was stored" in text


def test_a_hub_that_can_not_be_written_is_said_and_the_folder_stays(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("card")
    with pytest.raises(UserError, match=r"--push: 'a/b/c' could not be written: .*hf upload a/b/c"):
        upload(tmp_path, "a/b/c")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--push: 'a/b' could not be written"):
        upload(tmp_path, "a/b")
    with pytest.raises(SystemExit):
        cli.main(["export", str(tmp_path), "--output", str(tmp_path / "x"), "--push", "a/b"])
    assert "--push and --license belong to --to hub" in capsys.readouterr().err
