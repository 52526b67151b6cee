"""Every recipe is a whole, possible config."""

import dataclasses
import math
import typing

import pytest

from dreamlip_train.captions.columns import CAPTION_COLUMNS
from dreamlip_train.config.recipes import RECIPES
from dreamlip_train.config.toml import differences, format_config, override, read_config
from dreamlip_train.config.validation import validate
from dreamlip_train.model.build import build_model


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_survive_their_file(name, tmp_path):
    import tomllib

    config = RECIPES[name]()
    validate(config)
    assert override(type(config)(), tomllib.loads(format_config(config))).to_dict() == config.to_dict()
    assert RECIPES[name].__doc__


def changed(value, kind):
    """Another value of a field's type, None where it takes one and is not None."""
    arguments = typing.get_args(kind)
    if type(None) in arguments:
        return None if value is not None else changed_from(next(k for k in arguments if k is not type(None)), value)
    return changed_from(kind, value)


def changed_from(kind, value):
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return next(choice for choice in reversed(arguments) if choice != value)
    if origin is tuple:
        return ("a", "b") if arguments[0] is str else (0.25,) * len(arguments)
    if origin is dict:
        if arguments[1] in (float, str):
            return {"a b": 0.5 if arguments[1] is float else "é::\\ None"}
        return {"x": {"y": [1, None, "é\x7f\n", 2.5]}, "z": None}
    return {bool: not value, int: 7, float: math.inf, str: 'a "b" \\ é 日本 # ['}[kind]


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_of_a_run_repeats_it_whatever_was_changed(name, tmp_path):
    """None could not be written: a run of --loss.threshold None was repeated with the recipe's."""
    config = RECIPES[name]()
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        kinds = typing.get_type_hints(type(part))
        for field in dataclasses.fields(part):
            setattr(part, field.name, changed(getattr(part, field.name), kinds[field.name]))
    (tmp_path / "config.toml").write_text(format_config(config), encoding="utf-8")
    assert read_config(tmp_path / "config.toml", RECIPES[name]()) == config
    assert len(differences(RECIPES[name](), config)) == sum(len(vars(part)) for part in vars(config).values())


def test_the_papers_settings_hold_in_every_large_recipe():
    for name, recipe in RECIPES.items():
        if name != "demo":
            config = recipe()
            captions = 1 if name.startswith(("clip", "laclip")) else 10
            assert (config.train.epochs, config.data.num_sub_captions, config.model.context_length) == (
                32,
                captions,
                77,
            )
            assert (config.optim.lr, config.optim.beta2, config.optim.warmup_steps) == (5e-4, 0.98, 2000)
            assert config.train.global_batch_size == (1024 if "cc3m" in name else 6144)
            assert config.optim.weight_decay == (0.2 if name.startswith(("merged", "laion")) else 0.5)


def test_the_demo_model_is_small_and_has_a_patch_grid():
    config = RECIPES["demo"]()
    model = build_model(config.model, seed=0)
    assert model.image_size == 64 and model.grid == (8, 8)
    assert sum(p.numel() for p in model.parameters()) < 20e6


@pytest.mark.parametrize("name", ["clip", "laclip", "stablerep", "sigmoid"])
def test_a_baseline_differs_from_dreamlip_in_its_captions_and_loss_alone(name):
    ours, baseline = RECIPES["cc3m_vitb16"](), RECIPES[f"{name}_cc3m_vitb16"]()
    allowed = {
        "data.caption_sources",
        "data.num_sub_captions",
        "loss.grouping_weight",
        "loss.negatives",
        "model.local_logit_scale",
    }
    if name == "sigmoid":
        allowed |= {"loss.pairs", "model.init_temperature", "model.init_logit_bias"}
    changed = differences(ours, baseline)
    assert set(changed) <= allowed and changed["loss.grouping_weight"] == (1.0, 0.0)
    assert (baseline.loss.negatives == "all") == (name == "stablerep") and (
        len(baseline.data.caption_sources) == 1
    ) == (name == "clip")


def test_the_recipe_of_table_7s_last_row_differs_in_its_captions_alone():
    changed = differences(RECIPES["cc3m_vitb16"](), RECIPES["captioners_cc3m_vitb16"]())
    assert set(changed) == {"data.caption_sources"} and set(changed["data.caption_sources"][1]) == set(CAPTION_COLUMNS)
