"""Impossible settings are refused by name before anything is built; a TOML file is checked like the command line."""

import pytest

from dreamlip_train.config.presets import apply_preset
from dreamlip_train.config.renamed import refuse_renamed_flags
from dreamlip_train.config.schema import Config, LossConfig
from dreamlip_train.config.toml import differences, format_config, override, read_config
from dreamlip_train.config.validation import validate
from dreamlip_train.jobs.user_error import UserError


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"data": {"num_sub_captions": 0}}, "data.num_sub_captions"),
        ({"data": {"merged_num": 0}}, "data.merged_num"),
        ({"data": {"num_workers": -1}}, "data.num_workers"),
        ({"data": {"crop_scale": [0.9, 1.1]}}, "data.crop_scale"),
        ({"data": {"max_bad_fraction": 2}}, "data.max_bad_fraction"),
        ({"data": {"crop_ratio": [2.0, 1.0]}}, "data.crop_ratio"),
        ({"data": {"flip_prob": -0.5}}, "data.flip_prob"),
        ({"data": {"color_jitter": [0.1, 0.1, 0.1, 0.6]}}, "data.color_jitter"),
        ({"model": {"patch_dropout": 1.0}}, "model.patch_dropout"),
        ({"model": {"own_value_blocks": -1}}, "model.own_value_blocks"),
        ({"train": {"undropped_steps": 5}}, "train.undropped_steps"),
        ({"data": {"source_weights": {"raw_caption": -1.0}}}, "data.source_weights"),
        (
            {"data": {"caption_sources": ["longSV_captions"], "source_weights": {"raw_caption": 1.0}}},
            "data.source_weights",
        ),
        ({"data": {"shards": "a.tar", "mixture": {"a": "a.tar"}}}, "data.shards"),
        ({"data": {"proportions": {"a": 1.0}}}, "data.proportions"),
        ({"data": {"mixture": {"a": "a", "b": "b"}, "proportions": {"a": 1.0}}}, "data.proportions"),
        ({"data": {"mixture": {"a": "a"}, "proportions": {"a": 0.0}}}, "data.proportions"),
        ({"model": {"context_length": 2}}, "model.context_length"),
        ({"model": {"init_temperature": 0.001}}, "model.init_temperature"),
        ({"loss": {"mpcl_weight": 0, "grouping_weight": 0}}, "loss.mpcl_weight"),
        ({"loss": {"label_smoothing": 1.0}}, "loss.label_smoothing"),
        ({"loss": {"label_smoothing": -0.1}}, "loss.label_smoothing"),
        ({"loss": {"positives": "logsum"}}, "loss.positives"),
        ({"loss": {"pairs": "sigmoid"}}, "model.init_logit_bias"),
        ({"model": {"init_logit_bias": -10.0}}, "model.init_logit_bias"),
        ({"loss": {"pairs": "sigmoid", "negatives": "all"}, "model": {"init_logit_bias": -10.0}}, "loss.pairs"),
        ({"data": {"num_sub_captions": 1}}, "loss.grouping_weight"),
        ({"loss": {"grouping_weight": 0}}, "model.local_logit_scale"),
        (
            {"loss": {"grouping_weight": 0}, "model": {"local_logit_scale": False, "patch_projection": "local"}},
            "model.patch_projection",
        ),
        ({"loss": {"preset": "paper"}}, "loss.normalization"),
        ({"optim": {"lr": 0}}, "optim.lr"),
        ({"optim": {"layer_decay": 0.0}}, "optim.layer_decay"),
        ({"optim": {"vision_lr_scale": 0.0, "text_lr_scale": 0.0}}, "optim.vision_lr_scale"),
        ({"optim": {"cooldown_steps": 5}}, "optim.cooldown_steps"),
        ({"optim": {"schedule": "wsd"}}, "optim.cooldown_steps"),
        ({"train": {"global_batch_size": 0}}, "train.global_batch_size"),
        ({"train": {"epochs": 0}}, "train.epochs"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last"),
        ({"train": {"compile": True}, "deepspeed": {"zero_stage": 3}}, "train.compile"),
        ({"train": {"compile": True, "pack_captions": False}}, "train.pack_captions"),
        ({"eval": {"every_steps": 10}}, "eval.every_steps"),
        ({"eval": {"zero_shot": ["cifar10"]}}, "eval.zero_shot_root"),
    ],
)
def test_impossible_settings_name_the_field(settings, field):
    with pytest.raises(ValueError, match=rf"^{field}: got"):
        validate(override(Config(), settings))


def test_the_defaults_are_possible():
    validate(Config())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlrr = 1", r"optim.lrr: no such setting; did you mean optim.lr\b"),
        ("[optm]\nlr = 1", r"optm: no such setting; did you mean optim\b"),
        ("optim = 1", r"optim: got 1; it is a section, write \[optim\]"),
        ("[optim]\nlr = 'fast'", "optim.lr: got 'fast'; it must be float"),
        ("[deepspeed]\nzero_stage = 5", "deepspeed.zero_stage: got 5; choose from 0, 1, 2, 3"),
        ("[train]\nsteps = 1.5", "train.steps: got 1.5; it must be int"),
        ("[train]\ncompile = 1", "train.compile: got 1; it must be bool"),
        ("[data]\ncrop_scale = [1.0]", r"data.crop_scale: got \[1.0\]; give 2 values"),
        ("[data]\ncaption_sources = 'raw_caption'", "data.caption_sources: got 'raw_caption'; it must be tuple"),
        ("[data\n", "is not TOML"),
    ],
)
def test_wrong_keys_and_types_in_a_file_are_named(tmp_path, text, message):
    (tmp_path / "base.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "base.toml")
    with pytest.raises(ValueError, match="cannot read"):
        read_config(tmp_path / "missing.toml")


def test_a_written_config_reads_back_the_same(tmp_path):
    config = Config()
    config.data.shards = 'a "quoted" \\ path é 日本/{00..11}.tar'
    config.data.caption_sources, config.data.source_weights = (
        ("raw_caption", "longSV_captions"),
        {"longSV_captions": 2.0},
    )
    config.model.config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 64, "mlp_ratio": 4.0},
        "text_cfg": {"pool_type": "argmax"},
    }
    config.optim.lr, config.loss.threshold = 1e-7, 0.5
    config.deepspeed.config = {"zero_optimization": {"overlap_comm": True}}
    (tmp_path / "config.toml").write_text(format_config(config), encoding="utf-8")
    read = read_config(tmp_path / "config.toml")
    assert read == config and differences(config, read) == {}
    read.optim.lr = 2.0
    assert differences(config, read) == {"optim.lr": (1e-7, 2.0)}


def test_a_preset_sets_its_fields_and_refuses_others(tmp_path):
    (tmp_path / "base.toml").write_text('[loss]\npreset = "paper"\n')
    config = read_config(tmp_path / "base.toml")
    validate(config)
    loss = config.loss
    form = (loss.normalization, loss.normalize_patches, loss.contrast, loss.direction, config.model.local_logit_scale)
    assert form == ("none", False, "image", "t2v", False)
    release = apply_preset(config, "release")
    validate(release)
    assert (release.loss.threshold, release.loss.contrast, release.model.local_logit_scale) == (0.0, "batch", True)
    assert loss.contrast == "image"  # a copy
    assert apply_preset(Config(), "ours") == Config()
    (tmp_path / "base.toml").write_text('[loss]\npreset = "paper"\ndirection = "both"\n')
    with pytest.raises(ValueError, match="loss.direction: got 'both'; loss.preset=\"paper\" has 't2v'"):
        validate(read_config(tmp_path / "base.toml"))
    without = override(Config(), {"loss": {"grouping_weight": 0.0}, "model": {"local_logit_scale": False}})
    validate(apply_preset(without, "release"))


def test_patches_are_looked_at_with_the_evaluations_threshold_or_the_losss():
    config = Config(loss=LossConfig(threshold=0.2, normalization="softmax"))
    assert config.selection() == {"threshold": 0.2, "normalization": "softmax"}
    config.eval.threshold = 0.0
    assert config.selection()["threshold"] == 0.0


@pytest.mark.parametrize(
    "content", [b"[train]\nsteps = " + b"9" * 5000, b"[data]\nshards = '\xff'", b"a = " + b"[" * 100_000, b"\0"]
)
def test_what_is_no_toml_is_a_message(tmp_path, content):
    """Python's own errors of numbers, encodings and depth are no TOMLDecodeError."""
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(UserError, match="--config: .*c.toml' is not TOML"):
        read_config(tmp_path / "c.toml")


def test_a_setting_of_another_name_is_refused_with_its_new_one(tmp_path):
    with pytest.raises(UserError, match="--model.patch-attention: is now --model.own-value-blocks, 1 for"):
        refuse_renamed_flags(["demo", "--model.patch-attention", "own"])
    (tmp_path / "config.toml").write_text('[model]\npatch_attention = "own"\n')
    with pytest.raises(UserError, match="config.toml: model.patch_attention is now model.own_value_blocks, 1 for"):
        read_config(tmp_path / "config.toml")
