"""Training starts from whatever holds CLIP weights; another model, activation or name is refused by name."""

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import TOWERS, tiny_config, tiny_engine, tiny_model

from dreamlip_train.checkpoint.interoperability import export
from dreamlip_train.checkpoint.interoperability.pretrained import pretrained_weights
from dreamlip_train.checkpoint.saving import save
from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.model.build import build_model
from dreamlip_train.model.open_clip_weights import open_clip_state_dict, stretch_positions

CAPTIONS = ["a red star", "two round blue stones near the small moon and a large green square above the left one"]


def started(model: ModelConfig, source, **changes):
    model = dataclasses.replace(model, pretrained=str(source), **changes)
    return build_model(model, 9, pretrained_weights(model)).eval()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A run of the tiny model, and its weights exported as a file and as folders of open_clip and transformers."""
    folder = tmp_path_factory.mktemp("sources")
    config = tiny_config(0)
    config.model.patch_projection = "local"
    engine = tiny_engine(config)
    with torch.no_grad():
        engine.module.local_proj.add_(1.0)
    save(engine, folder / "run/checkpoints", config, TrainState(step=3))
    weights = open_clip_state_dict(engine.module)
    model = build_model(config.model, 0)
    model.clip.load_state_dict(engine.module.clip.state_dict())
    for name, write in (("open_clip", export._write_open_clip_dir), ("hf", export._write_hf_dir)):
        write(model, export.model_settings(config.model), folder / name)
    torch.save({"state_dict": weights}, folder / "weights.pt")
    return folder, weights


@pytest.mark.parametrize("name", ["run", "run/checkpoints/step-00000003", "open_clip", "hf", "weights.pt"])
def test_every_source_gives_its_weights(sources, name):
    folder, weights = sources
    new = started(tiny_model(patch_projection="local"), folder / name)
    for key, value in weights.items():
        assert torch.equal(new.clip.state_dict()[key].reshape(value.shape), value), key
    shift = (new.local_proj - new.clip.visual.proj).detach().mean()
    assert float(shift) == pytest.approx(1.0 if name.startswith("run") else 0.0, abs=0.01)


def test_what_does_not_fit_is_named(sources, tmp_path):
    folder, _ = sources
    wider = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "layers": 3}}
    for name in ("run", "open_clip", "hf"):
        with pytest.raises(ValueError, match=r"model.pretrained: .*another model: text layers 2 \(there\) and 3"):
            started(tiny_model(config=wider), folder / name)
        with pytest.raises(ValueError, match=r"activation 'GELU' \(there\) and 'QuickGELU'"):
            started(tiny_model(config={**TOWERS, "quick_gelu": True}), folder / name)
    with pytest.raises(ValueError, match="model.pretrained: .* from another model: transformer.resblocks.2"):
        started(tiny_model(config=wider), folder / "weights.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="model.pretrained: .*neither open_clip_config.json nor"):
        started(tiny_model(), tmp_path / "empty")
    named = ModelConfig(name="ViT-B-16")
    with pytest.raises(
        ValueError, match="no file or folder 'laion2b_s34', and no such tag: tags of ViT-B-16 are laion2b_"
    ):
        started(named, "laion2b_s34")
    with pytest.raises(ValueError, match="model.name: 'openai' has other activations .* give ViT-B-16-quickgelu"):
        started(named, "openai")
    with pytest.raises(ValueError, match="open_clip has no tag for tiny"):
        started(tiny_model(), "openai")


def test_positions_are_stretched_as_long_clip_does():
    """Its own code, for 77 to 248: each of the last 57 positions becomes 4, the last ones extrapolated."""
    old = torch.randn(77, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = [*old[:20]]
    for i in range(20, 76):
        wanted += [old[i] + part / 4 * (old[i + 1] - old[i]) for part in range(4)]
    wanted += [old[76] + part / 4 * (old[76] - old[75]) for part in range(4)]
    assert torch.allclose(stretch_positions(old, 248), torch.stack(wanted), atol=1e-12)
    assert torch.equal(stretch_positions(old, 77), old) and torch.equal(stretch_positions(old, 32), old[:32])
    assert stretch_positions(old[:1], 4).shape == (4, 6) and stretch_positions(old[:16], 17).shape == (17, 6)


def test_captions_keep_their_features_in_a_longer_context(tmp_path):
    """open_clip interpolates all positions, which moves the first ones of every caption."""
    old = build_model(tiny_model(context_length=77), 3).eval()
    torch.save({"state_dict": open_clip_state_dict(old)}, tmp_path / "77.pt")
    new = started(tiny_model(context_length=248), tmp_path / "77.pt")
    for caption, least in zip(CAPTIONS, (1 - 1e-6, 0.99), strict=True):
        with torch.no_grad():
            before, after = (model.encode_texts(model.tokenize([caption])) for model in (old, new))
        assert float(F.cosine_similarity(before, after)) >= least, caption


def test_a_siglip_of_transformers_gives_its_features(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

    @timm.models.register_model
    def vit_siglip_of_the_tests(pretrained=False, **given):  # timm's own has 86 million parameters
        given = {name: value for name, value in given.items() if not name.startswith(("pretrained_", "cache_"))}
        return timm.models.VisionTransformer(embed_dim=192, depth=2, num_heads=3, class_token=False, **given)

    tower = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "hidden_act": "gelu"}
    config = transformers.SiglipConfig(
        vision_config=tower | {"num_hidden_layers": 2, "image_size": 224, "patch_size": 16},
        text_config=tower | {"num_hidden_layers": 1, "vocab_size": 49408, "max_position_embeddings": 16},
    )
    theirs = transformers.SiglipModel(config).eval()
    theirs.save_pretrained(tmp_path / "siglip")
    text = {"width": 192, "heads": 3, "layers": 1, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    vision = {"timm_model_name": "vit_siglip_of_the_tests", "timm_pool": "map", "timm_proj": "none", "image_size": 224}
    towers = {"embed_dim": 192, "vision_cfg": vision, "text_cfg": text | {"norm_kwargs": {"eps": 1e-6}}}
    ours = started(tiny_model(config={**towers, "custom_text": True}), tmp_path / "siglip")
    tokens, pixels = ours.tokenize(CAPTIONS), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        for got, want in (
            (ours.clip.encode_text(tokens), theirs.get_text_features(input_ids=tokens)),
            (ours.clip.visual(pixels), theirs.get_image_features(pixel_values=pixels)),
        ):
            want = getattr(want, "pooler_output", want)
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
