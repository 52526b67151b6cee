"""Towers of every family through open_clip's own builders: features are open_clip's, patches lie in their space, and a
step trains all of it; what has no patch tokens trains the contrast alone.
"""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny import TOWERS, tiny_config, tiny_model

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.model.build import build_model
from dreamlip_train.model.open_clip_weights import fit_weights, open_clip_state_dict
from dreamlip_train.training.engine.optimizer import _scale, parameter_groups
from dreamlip_train.training.run import _check_model
from dreamlip_train.training.step import move_batch

TEXT = TOWERS["text_cfg"]
BIDIRECTIONAL = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}


def timm(name: str, pool: str, proj: str | None, text: dict = TEXT, size: int = 224) -> dict:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    return {"embed_dim": 192 if proj == "none" else 32, "vision_cfg": vision, "text_cfg": text, "custom_text": True}


# What open_clip's configs of these names are, at a smaller width.
FAMILIES = {
    "a timm ViT": timm("vit_tiny_patch16_224", "avg", "linear"),
    "EVA02": timm("eva02_tiny_patch14_224", "token", None),
    "SigLIP": timm("vit_tiny_patch16_224", "map", "none", BIDIRECTIONAL),
    "bidirectional text": {**TOWERS, "text_cfg": BIDIRECTIONAL, "custom_text": True},
}


def pictures(model, count: int) -> torch.Tensor:
    size = (count, 3, model.image_size, model.image_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_trains_every_family(family):
    settings = FAMILIES[family]
    model = build_model(tiny_model(config=settings), 0).eval()
    images = pictures(model, 2)
    tokens = model.tokenize(["red", "a small star", "two moons", ""])
    pixels = (images / 255 - model.image_mean) / model.image_std
    with torch.no_grad():
        image, patches = model.encode_images(images)
        plain = model.clip.visual(pixels)
        plain = plain[0] if isinstance(plain, tuple) else plain
        torch.testing.assert_close(image, F.normalize(plain, dim=-1))
        text = F.normalize(model.clip.encode_text(tokens), dim=-1)
        torch.testing.assert_close(model.encode_texts(tokens), text, atol=1e-6, rtol=1e-5)
    assert patches.shape == (2, model.grid[0] * model.grid[1], image.shape[1]) and image.shape[1] == model.embed_dim
    assert model.packs_captions == (settings["text_cfg"] is TEXT)
    batch = {"images": images, "text": tokens.view(2, 2, -1), "text_mask": torch.ones(2, 2, dtype=torch.bool)}
    moved = move_batch(batch, torch.device("cpu"), True, not model.packs_captions)
    out = model.train()(moved["images"], moved["text"])
    DreamLIPLoss()(**out, text_mask=moved["text_mask"]).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without, without
    kept = {_scale(name, model, tiny_config().optim) for name, _ in model.named_parameters()}
    assert kept == {1.0} and len(parameter_groups(model, tiny_config().optim)) == 2


def test_the_pooled_token_projected_is_the_embedding():
    """Patches pass what the pooled token passes: of the mean over them the projection is the embedding."""
    model = build_model(tiny_model(config=FAMILIES["a timm ViT"]), 0).eval()
    trunk, visual = model.clip.visual.trunk, model.clip.visual
    with torch.no_grad():
        tokens = trunk.forward_features(torch.randn(1, 3, 224, 224))
        mean = tokens[:, trunk.num_prefix_tokens :].mean(1)
        torch.testing.assert_close(
            visual.head(trunk.forward_head(tokens)), visual.head(trunk.head(trunk.fc_norm(mean)))
        )


def test_mobileclip2s_image_tower_has_patches():
    with torch.device("meta"):
        model = build_model(tiny_model(name="MobileCLIP2-B", config={}, context_length=77), 0)
        image, patches = model.encode_images(torch.empty(1, 3, 224, 224))
    assert model.has_patches and model.packs_captions and patches.shape == (1, 196, 512) and image.shape == (1, 512)
    assert model.image_mean.shape == (3, 1, 1)


def test_towers_without_patches_train_the_contrast_alone():
    config = tiny_config()
    config.model.name, config.model.config = (
        "RN",
        {
            **TOWERS,
            "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        },
    )
    model = build_model(config.model, 0)
    assert not model.has_patches and model.encode_images(pictures(model, 2))[1] is None
    with pytest.raises(ValueError, match="loss.grouping_weight: .*'RN' gives no patch tokens .*ModifiedResNet"):
        _check_model(config, model)
    config.loss.grouping_weight = 0.0
    _check_model(config, model)
    config.model.patch_projection = "local"
    with pytest.raises(ValueError, match="model.patch_projection: .*no patch tokens"):
        build_model(config.model, 0)
    for change, why in (({"final_ln_after_pool": True}, "final_ln_after_pool"), ({"pool_type": "none"}, "'none'")):
        config = tiny_config()
        config.model.config = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], **change}}
        with pytest.raises(ValueError, match=f"loss.grouping_weight: .*{why}"):
            _check_model(config, build_model(config.model, 0))


def test_compiling_needs_a_causal_text_tower():
    config = tiny_config()
    config.model.config, config.train.compile = FAMILIES["bidirectional text"], True
    with pytest.raises(ValueError, match="train.compile: .* is not causal"):
        _check_model(config, build_model(config.model, 0))


def test_layers_of_every_family_decay():
    config = tiny_config()
    config.optim.layer_decay, config.optim.vision_lr_scale = 0.5, 0.1
    model = build_model(tiny_model(config=FAMILIES["EVA02"]), 0)
    rate = {name: _scale(name, model, config.optim) for name, _ in model.named_parameters()}
    assert rate["clip.visual.trunk.blocks.11.norm1.weight"] == pytest.approx(0.05)
    assert rate["clip.visual.trunk.patch_embed.proj.weight"] == pytest.approx(0.1 * 0.5**13)
    assert rate["clip.text.transformer.resblocks.0.ln_1.weight"] == 0.25 and rate["clip.logit_scale"] == 1.0
    assert rate["clip.text.token_embedding.weight"] == 0.125 and rate["clip.visual.trunk.norm.weight"] == 0.1


def test_weights_of_a_plain_clip_and_a_bias_fit_a_custom_text_tower():
    plain = build_model(tiny_model(), 1)
    custom = build_model(tiny_model(config={**TOWERS, "custom_text": True}), 2)
    fit_weights(custom.clip, open_clip_state_dict(plain) | {"logit_bias": torch.tensor(-10.0)}, "x.pt")
    tokens = plain.tokenize(["a red star"])
    assert torch.equal(custom.encode_texts(tokens), plain.encode_texts(tokens))
    assert isinstance(custom.clip, open_clip.CustomTextCLIP)


@pytest.mark.parametrize("own", [1, 2])
def test_patches_kept_apart_tell_of_their_own_place_and_leave_the_embedding_alone(own):
    """Patches of a tower that keeps them apart in all its blocks are functions of their own pixels."""
    vision = {**TOWERS["vision_cfg"], "layers": own}
    settings = tiny_model(config={**TOWERS, "vision_cfg": vision})
    full = build_model(settings, 0).eval()
    settings.own_value_blocks = own
    apart = build_model(settings, 0).eval()
    assert apart.state_dict().keys() == full.state_dict().keys()
    images = pictures(apart, 2)
    images[1, :, : apart.image_size // 2] = images[0, :, : apart.image_size // 2]  # the upper half is the same
    with torch.no_grad():
        embedding, patches = apart.encode_images(images)
        usual_embedding, usual_patches = full.encode_images(images)
    torch.testing.assert_close(embedding, usual_embedding)
    upper = patches.shape[1] // 2
    torch.testing.assert_close(patches[0, :upper], patches[1, :upper])
    assert (patches[:, upper:] - usual_patches[:, upper:]).abs().max() > 1e-3
    assert (usual_patches[0, :upper] - usual_patches[1, :upper]).abs().max() > 1e-3


def test_patches_kept_apart_in_the_last_blocks_have_attended_before_them():
    vision = {**TOWERS["vision_cfg"], "layers": 4}
    model = build_model(tiny_model(config={**TOWERS, "vision_cfg": vision}, own_value_blocks=3), 0)
    images = pictures(model, 2)
    blocks = model.clip.visual.transformer.resblocks
    with torch.no_grad():
        x = blocks[0](model.clip.visual._embeds((images / 255 - model.image_mean) / model.image_std))[:, 1:]
        for block in blocks[1:]:
            attention = block.attn
            value = F.linear(block.ln_1(x), attention.in_proj_weight[-32:], attention.in_proj_bias[-32:])
            x = x + attention.out_proj(value)
            x = x + block.mlp(block.ln_2(x))
        expected = model.clip.visual.ln_post(x) @ model.clip.visual.proj
    _, patches = model.encode_images(images)
    torch.testing.assert_close(patches, expected)
    patches.square().sum().backward()
    gradient = model.clip.visual.conv1.weight.grad.clone()
    model.zero_grad()
    model.clip.visual.set_grad_checkpointing()
    model.train().encode_images(images)[1].square().sum().backward()
    torch.testing.assert_close(model.clip.visual.conv1.weight.grad, gradient)


def test_only_a_class_token_can_be_kept_apart_from_patches():
    averaged = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "pool_type": "avg"}}
    for config in (averaged, FAMILIES["a timm ViT"]):
        with pytest.raises(ValueError, match="model.own_value_blocks: .*'tiny' has no class token"):
            build_model(tiny_model(config=config, own_value_blocks=1), 0)
    with pytest.raises(ValueError, match="model.own_value_blocks: got 3, the image tower of 'tiny' has 2 blocks"):
        build_model(tiny_model(own_value_blocks=3), 0)
