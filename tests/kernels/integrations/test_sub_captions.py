"""K captions per image in other people's towers: blocks of tokens, masks, features, and gradients chunk by chunk."""

import copy
import pickle

import pytest
import torch

from dreamlip_kernels import DreamLIPLoss, multi_positive_contrastive_loss
from dreamlip_kernels.integrations.open_clip import SubCaptionTokenizer, accept_sub_captions, text_mask
from dreamlip_kernels.integrations.sentence_transformers import MultiPositiveRankingLoss
from dreamlip_kernels.integrations.sub_captions import split_sentences


def words_to_tokens(texts, context_length=6):
    """Numbers of letters of the words, between 90 and 91."""
    rows = [[90, *(len(word) for word in text.split()), 91][:context_length] for text in texts]
    return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


class Tokenizer:
    context_length = 6

    def __call__(self, texts, context_length=6):
        return words_to_tokens(texts, context_length)


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A dog. A red ball!", ["A dog.", "A red ball!"]),
        ("one\n\n two \n", ["one", "two"]),
        ("no end", ["no end"]),
        ("3.5 m wide. Yes?", ["3.5 m wide.", "Yes?"]),
        (" \n ", []),
    ],
)
def test_sentences(caption, expected):
    assert split_sentences(caption) == expected


def test_tokens_of_fewer_captions_than_slots_end_in_zeros():
    tokens = SubCaptionTokenizer(Tokenizer(), 3)(["A dog. A red ball.", "", ["given. whole", "b", "c"]])
    assert tokens.shape == (3, 3, 6)
    assert torch.equal(tokens[0, :2], words_to_tokens(["A dog.", "A red ball."])) and not tokens[0, 2].any()
    assert text_mask(tokens).tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert torch.equal(tokens[2], words_to_tokens(["given. whole", "b", "c"]))


def test_more_captions_than_slots_are_drawn_without_replacement():
    tokenizer = SubCaptionTokenizer(Tokenizer(), 2)
    captions = ["a", "bb", "ccc", "dddd"]
    drawn = [tuple(tokenizer([captions])[0, :, 1].tolist()) for _ in range(60)]
    assert all(a != b for a, b in drawn) and {length for pair in drawn for length in pair} == {1, 2, 3, 4}


def test_a_tokenizer_keeps_its_attributes_travels_to_workers_and_takes_one_string():
    tokenizer = pickle.loads(pickle.dumps(SubCaptionTokenizer(Tokenizer(), 2)))
    assert tokenizer.context_length == 6 and tokenizer("A dog.").shape == (1, 2, 6)
    assert tokenizer(["x"], context_length=4).shape == (1, 2, 4)
    with pytest.raises(ValueError, match="num_sub_captions must be at least 1, got 0"):
        SubCaptionTokenizer(Tokenizer(), 0)


# --- open_clip --------------------------------------------------------------------------------------------------------

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 92, "width": 32, "heads": 2, "layers": 1},
}


def clip(custom_text=False, **options):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    cls = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    return cls(**copy.deepcopy(CONFIG), output_dict=True, **options)


def batch():
    captions = ["A dog. A red ball.", "Grass", "Sky above. Sea below. Sun"]
    return torch.randn(3, 3, 16, 16), SubCaptionTokenizer(Tokenizer(), 3)(captions)


@pytest.mark.parametrize("custom_text", [False, True])
def test_an_open_clip_model_gives_what_the_loss_takes(custom_text):
    plain, (image, text) = clip(custom_text, init_logit_bias=-10.0), batch()
    model = accept_sub_captions(copy.deepcopy(plain)).train()
    out = model(image, text)
    assert [*model.state_dict()] == [*plain.state_dict()] and isinstance(model, type(plain))
    assert out["text_features"].shape == (3, 3, 16) and out["patch_features"].shape == (3, 4, 16)
    torch.testing.assert_close(out["image_features"], plain.encode_image(image, normalize=True))
    torch.testing.assert_close(out["text_features"][0, 1], plain.encode_text(text[0, 1:2], normalize=True)[0])
    assert torch.equal(out["text_mask"], text_mask(text)) and out["logit_bias"] == -10
    visual = plain.visual.forward_intermediates(image, indices=1, normalize_intermediates=True, output_fmt="NLC")
    tokens = visual["image_intermediates"][0]
    torch.testing.assert_close(out["patch_features"], tokens @ plain.visual.proj)
    losses = DreamLIPLoss()(**out, output_dict=True)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_in_evaluation_a_caption_is_the_mean_of_its_sub_captions():
    plain, (image, text) = clip(), batch()
    model = accept_sub_captions(copy.deepcopy(plain)).eval()
    out = model(image, text)
    assert set(out) == {"image_features", "text_features", "logit_scale"}
    two = plain.encode_text(text[0, :2], normalize=True).mean(0)
    torch.testing.assert_close(out["text_features"][0], two / two.norm())
    torch.testing.assert_close(model.encode_text(text)[1], plain.encode_text(text[1, :1], normalize=True)[0])
    torch.testing.assert_close(model.encode_text(text[:, 0]), plain.encode_text(text[:, 0]))


def test_towers_without_patch_tokens_are_named():
    with pytest.raises(ValueError, match="ModifiedResNet has no patch tokens.*patches=False"):
        model = clip()
        model.visual.__class__ = type("ModifiedResNet", (torch.nn.Module,), {})
        del model.visual.output_tokens
        accept_sub_captions(model)
    model = accept_sub_captions(clip(), patches=False).train()
    assert "patch_features" not in model(*batch())


def test_it_trains_compiled_whole():
    model, inputs = accept_sub_captions(clip()).train(), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(dict(compiled(*inputs)), dict(model(*inputs)))


# --- transformers -----------------------------------------------------------------------------------------------------


def hf_clip(chunk_size=None):
    transformers = pytest.importorskip("transformers")
    from dreamlip_kernels.integrations.transformers import SubCaptionCLIP

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {"vocab_size": 92, "max_position_embeddings": 6, "eos_token_id": 91, "pad_token_id": 0, "bos_token_id": 90}
    vision = {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=16)
    return SubCaptionCLIP(transformers.CLIPModel(config), chunk_size=chunk_size)


def hf_inputs():
    image, text = batch()
    return dict(pixel_values=image, input_ids=text, attention_mask=(text != 0).long(), text_mask=text_mask(text))


def test_a_clip_model_gives_the_loss_and_its_own_features():
    model, inputs = hf_clip().train(), hf_inputs()
    out = model(**inputs)
    rows = dict(input_ids=inputs["input_ids"][0, :2], attention_mask=inputs["attention_mask"][0, :2])
    theirs = model.clip(pixel_values=inputs["pixel_values"], **rows)
    torch.testing.assert_close(out["image_embeds"], theirs.image_embeds)
    torch.testing.assert_close(out["text_embeds"][0, :2], theirs.text_embeds)
    assert out["text_embeds"].shape == (3, 3, 16) and out["loss"].ndim == 0
    assert model.eval()(**inputs)["text_embeds"].shape == (3, 16)


def test_chunks_give_the_whole_batchs_gradients_and_hold_fewer_activations():
    whole, chunked, inputs = hf_clip().train(), hf_clip(chunk_size=1).train(), hf_inputs()
    saved = []

    def gradients(model):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(**inputs)["loss"]
        saved.append(count)
        return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]

    for a, b in zip(gradients(whole), gradients(chunked), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert saved[1] < saved[0] / 2, saved


# --- sentence-transformers --------------------------------------------------------------------------------------------


class Embedder(torch.nn.Module):
    def forward(self, column):
        return {"sentence_embedding": column["x"]}


def test_the_ranking_loss_is_the_contrast_of_the_first_column_with_the_others():
    columns = [{"x": torch.randn(5, 8)} for _ in range(4)]
    anchor, *positives = (torch.nn.functional.normalize(c["x"], dim=-1) for c in columns)
    expected = multi_positive_contrastive_loss(anchor, torch.stack(positives, 1), 20.0, negatives="all")
    loss = MultiPositiveRankingLoss(Embedder(), negatives="all")
    torch.testing.assert_close(loss(columns, torch.zeros(5)), expected)
    with pytest.raises(ValueError, match="at least one positive, got 1"):
        loss(columns[:1])
