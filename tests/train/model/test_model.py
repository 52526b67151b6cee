"""The model against open_clip's own forward pass, and what it refuses."""

import math
import pickle

import open_clip
import pytest
import torch
from tiny import TOWERS, tiny_model, tiny_tokenize

from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.model.build import build_model
from dreamlip_train.model.dreamlip import MAX_LOGIT_SCALE, BoundedBelowLog100, crop_to_longest, logit_multiplier
from dreamlip_train.model.flops import training_flops
from dreamlip_train.model.open_clip_weights import open_clip_state_dict

TEXTS = [
    "red",
    "a small red star",
    "the large blue moon left near two round square",
    "",
    "green " * 40,
    "a small star above the moon",
]


@pytest.fixture(scope="module")
def model():
    return build_model(tiny_model(), seed=0).eval()


@pytest.fixture(scope="module")
def plain(model):
    """open_clip's CLIP of the same weights."""
    towers = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "context_length": 16}}
    clip = open_clip.CLIP(**towers)
    clip.load_state_dict(open_clip_state_dict(model))
    return clip.eval()


def pictures(n=6):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalized(images):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (images.float() / 255 - mean) / std


def test_features_are_open_clips(model, plain):
    images, tokens = pictures(), tiny_tokenize(TEXTS)
    with torch.no_grad():
        out = model(images, tokens.view(2, 3, -1).repeat(3, 1, 1))
        torch.testing.assert_close(
            out["image_features"], plain.encode_image(normalized(images), normalize=True), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            out["text_features"][:2].flatten(0, 1), plain.encode_text(tokens, normalize=True), atol=1e-6, rtol=0
        )
        inner = plain.visual.forward_intermediates(
            normalized(images), indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        patches = inner["image_intermediates"][0] @ plain.visual.proj
        torch.testing.assert_close(out["patch_features"], patches, atol=1e-6, rtol=0)
    assert out["patch_features"].shape == (6, model.grid[0] * model.grid[1], 32)
    assert out["logit_scale"].shape == () and math.isclose(float(out["logit_scale"]), 1 / 0.07, rel_tol=1e-6)


def test_cropping_to_the_longest_caption_is_exact(model, plain):
    for texts in (TEXTS, TEXTS[:2], [""]):
        tokens = tiny_tokenize(texts)
        cropped = crop_to_longest(tokens)
        assert cropped.shape[1] == max(int(row.argmax()) + 1 for row in tokens)
        with torch.no_grad():
            torch.testing.assert_close(
                model.encode_texts(tokens), plain.encode_text(tokens, normalize=True), atol=1e-6, rtol=0
            )
    assert crop_to_longest(tiny_tokenize(TEXTS[:2]).view(2, 1, -1)).shape == (2, 1, 6)


def test_float_pictures_in_0_1_equal_uint8_ones(model):
    with torch.no_grad():
        for whole, part in zip(
            model.encode_images(pictures()), model.encode_images(pictures().float() / 255), strict=True
        ):
            torch.testing.assert_close(whole, part)


def test_the_layout_of_the_pixels_changes_no_feature(model):
    images, tokens, shown = pictures(), tiny_tokenize(TEXTS).view(2, 3, -1).repeat(3, 1, 1), []
    handle = model.clip.visual.conv1.register_forward_pre_hook(
        lambda _, given: shown.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    outs = []
    for model.channels_last in (False, True):
        outs += [
            model(given, tokens)["patch_features"]
            for given in (images, images.contiguous(memory_format=torch.channels_last))
        ]
    handle.remove()
    assert shown == [False, False, True, True]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-6, rtol=0)


def test_patches_of_an_autocast_tower_stay_at_16_bits(model):
    """They are the bulk of what the losses read; everything else is fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pictures(), tiny_tokenize(TEXTS).view(2, 3, -1).repeat(3, 1, 1))
        images, patches = model.encode_images(pictures())
    assert out["patch_features"].dtype == torch.bfloat16
    assert {out[name].dtype for name in ("image_features", "text_features", "logit_scale")} == {torch.float32}
    assert (images.dtype, patches.dtype) == (torch.float32, torch.float32), "for evaluation"


@pytest.mark.parametrize(
    "extra", [{}, {"local_logit_scale": False, "init_logit_bias": -10.0}, {"patch_projection": "local"}]
)
def test_flops_are_counted_whatever_is_learned_beside_the_towers(extra):
    image, token = training_flops(build_model(tiny_model(**extra), seed=0))
    width, layers, patches = 32, 2, 16
    blocks = (
        3 * 2 * layers * 12 * width**2
    )  # forward and backward; 2 a multiply-add; attention's and the MLP's matrices
    assert image == pytest.approx((patches + 1) * blocks, rel=0.5) and token == pytest.approx(blocks, rel=0.5)


def test_the_bias_of_the_sigmoid_loss_is_no_part_of_what_is_exported(model, plain):
    biased = build_model(tiny_model(init_logit_bias=-10.0), seed=0)
    out = biased(pictures(2), tiny_tokenize(TEXTS[:2]).view(2, 1, -1))
    assert out["logit_bias"].shape == () and float(out["logit_bias"]) == -10.0
    assert open_clip_state_dict(biased).keys() == open_clip_state_dict(model).keys()
    out["logit_bias"].backward()
    assert biased.logit_bias.grad.tolist() == [1.0] and biased.clip.logit_scale.grad is None


def test_patches_are_left_out_on_request(model):
    assert model(pictures(2), tiny_tokenize(TEXTS[:2]).view(2, 1, -1), patches=False)["patch_features"] is None


def test_wrong_picture_size_and_too_long_text_are_named(model):
    with pytest.raises(ValueError, match=r"\[n, 3, 32, 32\], got \(2, 3, 64, 64\)"):
        model.encode_images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"17 tokens per row, model.context_length is 16"):
        model(pictures(1), torch.full((1, 1, 17), 49407))


def test_bound_lets_the_gradient_in_but_not_out():
    x = torch.tensor([-0.5, 0.0, 2.0, MAX_LOGIT_SCALE, 6.0], requires_grad=True)
    value = BoundedBelowLog100.apply(x)
    assert value.tolist() == pytest.approx([0.0, 0.0, 2.0, MAX_LOGIT_SCALE, MAX_LOGIT_SCALE])
    (up,) = torch.autograd.grad(value, x, -torch.ones(5), retain_graph=True)  # descent would raise x
    (down,) = torch.autograd.grad(value, x, torch.ones(5))
    assert up.tolist() == [-1, -1, -1, 0, 0]
    assert down.tolist() == [0, 0, 1, 1, 1]


def test_a_scale_that_overshot_comes_back():
    scale = torch.nn.Parameter(torch.tensor([5.0]))
    sgd = torch.optim.SGD([scale], lr=0.01)
    for _ in range(20):
        sgd.zero_grad()
        (multiplier := logit_multiplier(scale)).backward()  # wants a smaller multiplier
        assert multiplier.item() <= 100.001
        sgd.step()
    assert scale.item() < MAX_LOGIT_SCALE


def test_exported_state_is_exactly_open_clips(model, plain):
    trained = build_model(tiny_model(patch_projection="local"), seed=3)
    with torch.no_grad():
        trained.clip.logit_scale.fill_(5.0)
    state = open_clip_state_dict(trained)
    assert state.keys() == plain.state_dict().keys()
    assert state["logit_scale"].shape == () and float(state["logit_scale"]) == pytest.approx(MAX_LOGIT_SCALE)
    towers = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "context_length": 16}}
    open_clip.CLIP(**towers).load_state_dict(state, strict=True)


def test_local_projection_moves_the_patches_alone(model):
    local = build_model(tiny_model(patch_projection="local"), seed=0).eval()
    with torch.no_grad():
        before, patches_before = local.encode_images(pictures(2))
        torch.testing.assert_close(
            patches_before, model.encode_images(pictures(2))[1]
        )  # it starts as a copy of visual.proj
        local.local_proj.mul_(2)
        after, patches_after = local.encode_images(pictures(2))
    assert torch.equal(before, after)
    torch.testing.assert_close(patches_after, 2 * patches_before)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    first = build_model(tiny_model(), seed=1)
    assert torch.equal(torch.rand(1), expected_next)
    torch.manual_seed(9)
    again, other = build_model(tiny_model(), seed=1), build_model(tiny_model(), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.clip.visual.proj, other.clip.visual.proj)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_pretrained_file_is_loaded(tmp_path, model, prefix):
    torch.save(
        {"state_dict": {prefix + key: value for key, value in open_clip_state_dict(model).items()}}, tmp_path / "x.pt"
    )
    loaded = build_model(tiny_model(pretrained=str(tmp_path / "x.pt")), seed=7)
    assert torch.equal(loaded.clip.visual.proj, model.clip.visual.proj)
    longer = build_model(tiny_model(pretrained=str(tmp_path / "x.pt"), context_length=24), seed=7)
    assert longer.clip.positional_embedding.shape == (24, 32)


def test_weights_of_another_model_are_refused_by_key_and_shape(tmp_path, model):
    torch.save({"state_dict": open_clip_state_dict(model)}, tmp_path / "x.pt")
    wider = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "width": 64}}
    with pytest.raises(ValueError, match=r"another model: visual.* is \(.*\), this model's is \(.*and \d+ more"):
        build_model(tiny_model(config=wider, pretrained=str(tmp_path / "x.pt")), seed=0)
    deeper = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "layers": 3}}
    with pytest.raises(ValueError, match=r"transformer.resblocks.2.* is missing"):
        build_model(tiny_model(config=deeper, pretrained=str(tmp_path / "x.pt")), seed=0)


def test_files_that_are_not_weights_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with open(tmp_path / "pickle.pt", "wb") as file:
        pickle.dump(tiny_model(), file)  # an object: loading it would run its code
    torch.save({"args": tiny_model()}, tmp_path / "namespace.pt")
    for name in ("text.pt", "pickle.pt", "namespace.pt"):
        with pytest.raises(ValueError, match="model.pretrained: .* is not an open_clip weights file of tensors only"):
            build_model(tiny_model(pretrained=str(tmp_path / name)), seed=0)
    with pytest.raises(ValueError, match="model.pretrained: no file"):
        build_model(tiny_model(pretrained=str(tmp_path / "none.pt")), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ModelConfig(name="coca_ViT-B-32"), "text tower of 'coca_ViT-B-32' is not open_clip's own"),
        (ModelConfig(name="roberta-ViT-B-32"), "text tower of 'roberta-ViT-B-32' is not open_clip's own"),
        (ModelConfig(name="ViT-Z"), "open_clip knows no 'ViT-Z'"),
        (tiny_model(config={"embed_dim": 8}), "model.config: vision_cfg is missing"),
        (tiny_model(config={**TOWERS, "embed_dims": 8}), "model.config: .*embed_dims"),
        (tiny_model(config={**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "vocab_size": 100}}), "vocab_size is 100"),
        (
            tiny_model(config={**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "context_length": 77}}),
            "model.context_length: got 16",
        ),
    ],
)
def test_towers_that_cannot_work_name_the_field(settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(settings, seed=0)


def test_the_papers_model_by_name():
    model = build_model(ModelConfig(name="ViT-B-16"), seed=0)
    assert (model.image_size, model.grid, model.context_length) == (224, (14, 14), 77)
    assert len(open_clip_state_dict(model)) == 302
    assert model.tokenize(["word " * 100]).shape == (1, 77)
    assert int(model.tokenize(["word " * 100])[0, -1]) == 49407  # a truncated caption keeps its end token


def test_patches_are_dropped_in_training_alone_and_until_told():
    model = build_model(tiny_model(patch_dropout=0.5), 0)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert model._image_features(pixels, True)[1].shape[1] == 8
    assert model.eval().encode_images(pixels)[1].shape[1] == 16
    model.train().drop_patches(0.0)
    assert model._image_features(pixels, True)[1].shape[1] == 16
    build_model(tiny_model(), 0).drop_patches(0.5)  # has none to drop with
