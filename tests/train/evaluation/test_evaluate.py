"""Evaluation: retrieval against a brute-force ranking, localization on planted masks, and the driver on a model that is
right by construction.
"""

import itertools
import math

import pytest
import torch
from planted import GRID, PlantedModel, planted_sample

from dreamlip_train.config.schema import DataConfig, EvalConfig
from dreamlip_train.evaluation import held_out
from dreamlip_train.evaluation.held_out import evaluate, format_held_out
from dreamlip_train.evaluation.retrieval import recall
from dreamlip_train.evaluation.retrieval.recall import retrieval, retrieval_chance
from dreamlip_train.evaluation.segmentation.localization import localization, mask_to_regions


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute_force(images, texts, owner, k):
    """Percent of hits by sorting every similarity; no ties in random features."""
    t2i = [
        int(owner[j]) in sorted(range(len(images)), key=lambda i, j=j: -float(images[i] @ texts[j]))[:k]
        for j in range(len(texts))
    ]
    asked = [i for i in range(len(images)) if (owner == i).any()]
    i2t = [
        i in {int(owner[j]) for j in sorted(range(len(texts)), key=lambda j, i=i: -float(images[i] @ texts[j]))[:k]}
        for i in asked
    ]
    return 100 * sum(t2i) / len(t2i), 100 * sum(i2t) / len(i2t)


@pytest.mark.parametrize("tile", [2**24, 40])
def test_retrieval_equals_brute_force_with_several_captions_an_image(monkeypatch, tile):
    monkeypatch.setattr(recall, "_TILE_ELEMENTS", tile)
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 4, 5, 5, 6, 6, 6, 6, 7, 8])  # image 3 has none
    images = unit(9, 6)
    texts = torch.nn.functional.normalize(images[owner] + 0.9 * unit(15, 6, seed=1), dim=-1)
    got = retrieval(images, texts, owner, ks=(1, 3, 5))
    for k in (1, 3, 5):
        assert (got["t2i"][f"r_at_{k}"], got["i2t"][f"r_at_{k}"]) == pytest.approx(brute_force(images, texts, owner, k))


def test_closed_forms():
    eye = torch.eye(12)
    perfect = retrieval(eye, eye, torch.arange(12))
    assert all(value == 100 for way in perfect.values() for value in way.values())
    wrong = retrieval(eye, eye.roll(1, 0), torch.arange(12), ks=(1,))
    assert wrong == {"t2i": {"r_at_1": 0.0}, "i2t": {"r_at_1": 0.0}}


def test_a_collapsed_model_scores_chance_not_everything():
    """Counting `rank of the right one by >` alone would give it 100 %."""
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4])
    same = torch.ones(5, 3) / math.sqrt(3)
    got = retrieval(same, same[:1].expand(8, 3), owner)
    chance = retrieval_chance(owner, 5)
    for way, name in itertools.product(("t2i", "i2t"), ("r_at_1", "r_at_5", "r_at_10")):
        assert got[way][name] == pytest.approx(chance[way][name])
    assert chance["t2i"]["r_at_1"] == pytest.approx(20) and chance["i2t"]["r_at_1"] == pytest.approx(
        100 * (2 + 3 + 1 + 1 + 1) / 5 / 8
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_features=torch.full((3, 4), torch.nan)), "image_features: NaN or infinite values in 3 of 3 rows"),
        (dict(text_features=torch.ones(3, 5)), "with one D"),
        (dict(text_to_image=torch.tensor([0, 1, 7])), "must be in"),
        (dict(text_to_image=torch.ones(3)), "must be integers"),
        (dict(image_features=torch.ones(0, 4)), "at least one image"),
    ],
)
def test_bad_features_are_named(change, message):
    arguments = (
        dict(image_features=torch.ones(3, 4), text_features=torch.ones(3, 4), text_to_image=torch.arange(3)) | change
    )
    with pytest.raises(ValueError, match=message):
        retrieval(**arguments)


def test_regions_are_the_covered_patches():
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[0:8, 0:12] = 1  # patch (0, 0) whole and (0, 1) half, on a 2 x 2 grid of 8-pixel patches
    mask[9:11, 9:11] = 2  # smaller than half a patch
    regions = mask_to_regions(mask, 3, (2, 2))
    assert regions.tolist() == [[True, True, False, False], [False, False, False, True], [False] * 4]


def test_localization_of_planted_weights():
    regions = torch.zeros(2, 8, dtype=torch.bool)
    regions[0, :2], regions[1, 4:] = True, True
    perfect = localization(regions.double() / regions.sum(1, keepdim=True), regions)
    assert [perfect[name]["value"] for name in ("mass_inside", "pointing", "miou")] == [100, 100, 100]
    uniform = localization(torch.full((2, 8), 1 / 8), regions)
    area = 100 * (2 / 8 + 4 / 8) / 2
    for name in ("mass_inside", "pointing", "miou"):
        assert uniform[name]["value"] == pytest.approx(area) and uniform[name]["chance"] == pytest.approx(area)
    outside = localization((~regions).double() / (~regions).sum(1, keepdim=True), regions)
    assert [outside[name]["value"] for name in ("mass_inside", "pointing", "miou")] == [0, 0, 0]


def test_chance_of_miou_is_the_mean_over_random_selections():
    regions = torch.zeros(1, 10, dtype=torch.bool)
    regions[0, :4] = True
    weights = torch.zeros(1, 10)
    weights[0, :3] = 1 / 3
    exact = [
        len(set(pick) & {0, 1, 2, 3}) / len(set(pick) | {0, 1, 2, 3}) for pick in itertools.combinations(range(10), 3)
    ]
    assert localization(weights, regions)["miou"]["chance"] == pytest.approx(100 * sum(exact) / len(exact))


@pytest.fixture
def planted(monkeypatch):
    samples = [planted_sample(seed) for seed in range(40)]
    monkeypatch.setattr(
        held_out,
        "val_samples",
        lambda data, *, image_size, max_samples, is_ours: iter(
            {"position": i, **sample} for i, sample in enumerate(samples[: max_samples or None]) if is_ours(i)
        ),
    )
    return samples


def test_a_model_that_sees_color_localizes_and_a_mirrored_one_does_not(planted):
    settings = EvalConfig(batch_size=7)
    report = evaluate(PlantedModel(), DataConfig(), settings, "cpu", threshold=0.6)
    located = report["localization"]
    assert located["pointing"]["value"] > 95 > 20 > located["pointing"]["chance"]
    assert located["mass_inside"]["value"] > 2.5 * located["mass_inside"]["chance"] and located["sub_captions"] == 120
    long_caption = report["retrieval"]["long_caption"]
    assert long_caption["t2i"]["r_at_1"] > 4 * long_caption["chance"]["t2i"]["r_at_1"]
    mirrored = evaluate(PlantedModel(mirrored=True), DataConfig(), settings, "cpu", threshold=0.6)["localization"]
    assert mirrored["pointing"]["value"] < 60


def test_modes_and_limits(planted):
    model = PlantedModel().train()
    model.frozen.eval()
    report = evaluate(model, DataConfig(), EvalConfig(max_samples=9), "cpu")
    assert report["samples"] == 9 and report["sentences"] == 27
    assert model.modes_seen == {False} and model.training and not model.frozen.training
    text = format_held_out(report)
    assert "9 held-out images, 27 sentences" in text and "(11.1)" in text


def test_nan_features_name_their_samples(planted):
    model = PlantedModel()
    model.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="planted-"):
        evaluate(model, DataConfig(), EvalConfig(), "cpu")


def test_samples_without_sentences_are_counted_and_all_of_them_is_an_error(planted):
    planted[0]["sentences"] = []
    assert evaluate(PlantedModel(), DataConfig(), EvalConfig(), "cpu")["skipped"] == {
        "no sentence in a long caption": 1
    }
    for sample in planted:
        sample["sentences"] = []
    with pytest.raises(ValueError, match="set data.eval_source"):
        evaluate(PlantedModel(), DataConfig(val_shards="x"), EvalConfig(), "cpu")


def test_without_masks_there_is_no_localization(planted):
    for sample in planted:
        sample["mask"] = None
    report = evaluate(PlantedModel(), DataConfig(), EvalConfig(), "cpu")
    assert report["localization"] is None and "localization" not in format_held_out(report)
    assert report["samples"] == 40 and GRID == (8, 8)
