"""export: each format loaded by the program it is for, features compared; what a format can't hold is refused by
name.
"""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny import TOWERS, run_steps, tiny_config, tiny_engine
from torch.nn.functional import normalize
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from dreamlip_train import cli
from dreamlip_train.checkpoint.interoperability import export
from dreamlip_train.checkpoint.interoperability.export import export_checkpoint
from dreamlip_train.checkpoint.saving import save
from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.checkpoint.weights import load_for_eval
from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.model.build import build_model
from dreamlip_train.model.open_clip_weights import open_clip_state_dict

TEXTS = ["a photo of a dog", "Two RED cars &amp; a house, isn't it?", "naïve café  über 12,000 — x", "word " * 200]


@pytest.fixture(scope="module", params=[0, 2, 3])
def run(request, tmp_path_factory):
    """A run of the tiny model with every train-only parameter there is, at a ZeRO stage."""
    folder, config = tmp_path_factory.mktemp("run"), tiny_config(request.param)
    config.model.patch_projection = "local"
    engine = tiny_engine(config)
    run_steps(engine, config, 0, 2)
    save(engine, folder / "checkpoints", config, TrainState(step=2))
    return folder


def perturbed(name: str, **config) -> open_clip.CLIP:
    """open_clip's own model of that name with every weight moved, so that each of them matters."""
    model = open_clip.create_model(name, **config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def features(clip: open_clip.CLIP, pixels, tokens):
    with torch.no_grad():
        return normalize(clip.encode_image(pixels), dim=-1), normalize(clip.encode_text(tokens), dim=-1)


def test_the_open_clip_folder_has_the_features_of_the_run(run, tmp_path):
    found = export_checkpoint(run, tmp_path / "dir", "open_clip-dir")
    assert max(found.values()) <= 1e-6
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'dir'}").eval()
    model, _ = load_for_eval(run)
    pixels, tokens = torch.rand(2, 3, 32, 32), model.tokenize(TEXTS)
    _, text = features(loaded, pixels, tokens)
    with torch.no_grad():
        normal = (pixels - model.image_mean) / model.image_std
        ours = normalize(model.clip.visual(normal)[0], dim=-1)
        torch.testing.assert_close(features(loaded, normal, tokens)[0], ours, atol=1e-6, rtol=0)
        torch.testing.assert_close(text, model.encode_texts(tokens), atol=1e-6, rtol=0)
    assert not [name for name in loaded.state_dict() if "local" in name]
    stored = json.loads((tmp_path / "dir" / "open_clip_config.json").read_text())
    assert (
        stored["model_cfg"]["text_cfg"]["context_length"] == 16
        and stored["preprocess_cfg"]["interpolation"] == "bicubic"
    )


def test_transformers_gets_the_same_features_patches_and_pooling(run, tmp_path):
    found = export_checkpoint(run, tmp_path / "hf", "hf-dir")
    assert max(found.values()) <= 1e-5
    model, _ = load_for_eval(run)
    pixels = (torch.rand(2, 3, 32, 32) - model.image_mean) / model.image_std
    vision = CLIPVisionModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        tokens = vision(pixels).last_hidden_state[:, 1:]
        ours = model.clip.visual(pixels)[1]
        # ln_post comes after transformers' last hidden state
        norm = dict(vision.named_modules())[
            next(name for name, _ in vision.named_modules() if name.endswith("post_layernorm"))
        ]
        torch.testing.assert_close(norm(tokens), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("ViT-S-32-alt", "gelu"),
        ("ViT-B-32", "gelu"),
        ("ViT-B-32-quickgelu", "quick_gelu"),
    ],
)
@pytest.mark.slow
def test_a_model_of_full_size_in_every_format(tmp_path, name, activation):
    original = perturbed(name)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in original.state_dict().items()}},
        tmp_path / "official.pt",
    )  # DreamLIP's layout
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    pixels = torch.randn(2, 3, 224, 224)
    expected = features(original, pixels, tokens)
    for to in ("open_clip-file", "open_clip-dir", "hf-dir"):
        out = tmp_path / to.replace("file", "file.pt")
        assert max(export_checkpoint(tmp_path / "official.pt", out, to, name).values()) <= 1e-5
    content = torch.load(tmp_path / "open_clip-file.pt", weights_only=True)
    assert (
        set(content) == {"state_dict"}
        and set(content["state_dict"]) == set(original.state_dict())
        and content["state_dict"]["logit_scale"].shape == ()
    )
    for loaded in (
        open_clip.create_model(name, pretrained=str(tmp_path / "open_clip-file.pt")).eval(),
        open_clip.create_model(f"local-dir:{tmp_path / 'open_clip-dir'}").eval(),
    ):
        for ours, theirs in zip(expected, features(loaded, pixels, tokens), strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    hf = CLIPModel.from_pretrained(tmp_path / "hf-dir").eval()
    assert hf.config.vision_config.hidden_act == hf.config.text_config.hidden_act == activation
    words = CLIPTokenizer.from_pretrained(tmp_path / "hf-dir")(
        TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        out = hf(input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=pixels)
    torch.testing.assert_close(out.image_embeds, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.text_embeds[[0, 3]], expected[1][[0, 3]], atol=1e-5, rtol=0)
    torch.testing.assert_close(hf.logit_scale, original.logit_scale)


def test_the_tokenizer_gives_open_clips_numbers(tmp_path):
    model = build_model(ModelConfig(name="tiny", config=TOWERS, context_length=16), 0)
    export._write_hf_dir(model, {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "context_length": 16}}, tmp_path / "hf")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    special = ("the <|endoftext|> sign", "<|startoftext|> is no word")
    for text in ("a photo of a dog", "Two RED cars, isn't it?", "12,000 trees", "word " * 40, "caf\u0301e", *special):
        row = theirs(text, truncation=True)["input_ids"]
        ours = tokenizer([text])[0]
        assert row == ours[: len(row)].tolist() and not ours[len(row) :].any(), text
    # What docs/interoperability.md says is different, and what it advises.
    for text in ("bread &amp; butter", "\u201cyes\u201d", "\ufb01ne", "sch\u00c3\u00b6n"):
        ours = tokenizer.encode(text)
        assert theirs(text)["input_ids"][1:-1] != ours
        assert theirs(open_clip.tokenizer.basic_clean(text))["input_ids"][1:-1] == ours
    assert theirs("an <end_of_text> here")["input_ids"][1:-1] != tokenizer.encode("an <end_of_text> here")


def test_the_image_processor_gives_open_clips_pixels(tmp_path):
    model = build_model(ModelConfig(name="tiny", config=TOWERS, context_length=16), 0)
    export._write_hf_dir(model, {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "context_length": 16}}, tmp_path / "hf")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((256, 192))
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "hf")
    got = processor(images=picture, return_tensors="pt")["pixel_values"]
    expected = open_clip.image_transform(32, is_train=False)(picture)[None]
    assert (
        got - expected
    ).abs().mean() < 0.01 and got.shape == expected.shape  # another resize routine, the same geometry


def test_llava_takes_the_vision_tower(tmp_path):
    model = build_model(ModelConfig(name="tiny", config=TOWERS, context_length=16), 0)
    export._write_hf_dir(model, {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "context_length": 16}}, tmp_path / "hf")
    tower = CLIPVisionModel.from_pretrained(tmp_path / "hf")
    from transformers import LlamaConfig

    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower.config, text_config=text, image_token_index=5, vision_feature_layer=-2)
    )
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    ids = torch.tensor([[1, *[5] * 16, 7, 8]])
    with torch.no_grad():
        logits = llava(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32)).logits
    assert logits.shape == (1, 19, 64) and bool(torch.isfinite(logits).all())


def test_what_a_format_can_not_hold_is_named(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="--to: open_clip has no model called 'tiny'.* use open_clip-dir"):
        export_checkpoint(run, tmp_path / "x.pt", "open_clip-file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), "--to", "hf-dir", "--output", str(tmp_path / "full")])
    assert "--output: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize(
    ("changes", "message"), [({"pool_type": "avg"}, "pools by 'avg'"), ({"no_ln_pre": True}, "no_ln_pre=True")]
)
def test_models_transformers_does_not_know_are_refused(tmp_path, changes, message):
    config = tiny_config()
    config.model.config = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], **changes}}
    engine = tiny_engine(config)
    save(engine, tmp_path / "checkpoints", config, TrainState(step=2))
    with pytest.raises(ValueError, match=f"--to hf-dir: .*{message}.*use open_clip-dir"):
        export_checkpoint(tmp_path, tmp_path / "hf", "hf-dir")
    assert (
        not (tmp_path / "hf").exists()
        and max(export_checkpoint(tmp_path, tmp_path / "oc", "open_clip-dir").values()) <= 1e-6
    )


def test_a_wrong_translation_is_found_and_leaves_nothing(run, tmp_path, monkeypatch):
    from dreamlip_train.checkpoint.interoperability import hf_clip

    monkeypatch.setitem(hf_clip._IN_BLOCK, "ln_1", "layer_norm2")
    monkeypatch.setitem(hf_clip._IN_BLOCK, "ln_2", "layer_norm1")
    model, _ = load_for_eval(run)
    with torch.no_grad():
        for block in model.clip.visual.transformer.resblocks:
            block.ln_1.weight.add_(torch.rand_like(block.ln_1.weight))
    monkeypatch.setattr(export, "load_for_eval", lambda *_: (model, load_for_eval(run)[1]))
    with pytest.raises(RuntimeError, match="--to hf-dir: loaded back, features differ"):
        export_checkpoint(run, tmp_path / "hf", "hf-dir")
    assert not list(tmp_path.iterdir())


def test_another_context_length_keeps_its_text_features_or_is_refused(tmp_path):
    """Loaded as documented, a file of a model with 32 tokens had text features of cosine 0.90 to its own."""
    config = tiny_config()
    config.model = ModelConfig(name="ViT-S-32-alt", context_length=32)
    engine = tiny_engine(config)
    save(engine, tmp_path / "checkpoints", config, TrainState(step=1))
    with pytest.raises(
        ValueError, match="--to: this model reads 32 tokens .* as ViT-S-32-alt with 77.*use open_clip-dir"
    ):
        export_checkpoint(tmp_path, tmp_path / "x.pt", "open_clip-file")
    for to in ("open_clip-dir", "hf-dir"):
        assert max(export_checkpoint(tmp_path, tmp_path / to, to).values()) <= 1e-5


def test_state_dict_is_the_contract(run):
    model, _ = load_for_eval(run)
    state = open_clip_state_dict(model)
    assert all(value.dtype == torch.float32 for value in state.values()) and state["logit_scale"].shape == ()
