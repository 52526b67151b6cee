"""Average precision is scikit-learn's, class features are the mean over prompts, and lists that do not fit are
named.
"""

import json

import numpy as np
import pytest
import torch
from shard_files import jpeg
from tiny import tiny_model

from dreamlip_train import cli
from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.evaluation.classification.class_prompts import class_features, read_classes, read_templates
from dreamlip_train.evaluation.classification.multi_label import (
    average_precision,
    evaluate_multi_label,
    format_multi_label,
    read_labels,
)
from dreamlip_train.model.build import build_model

CLASSES = ["red star", "blue moon", "dog; hound", "nothing like it"]


def scikit_learn_precision(targets: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import average_precision_score  # a second, in every process that collects these tests

    return average_precision_score(targets, scores)


@pytest.fixture(scope="module")
def model():
    return build_model(tiny_model(), seed=3).eval()


@pytest.mark.parametrize("levels", [0, 3])
def test_average_precision_is_scikit_learns_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    scores = rng.normal(size=(200, 7)) if levels == 0 else rng.integers(0, levels, (200, 7)).astype(float)
    targets = rng.random((200, 7)) < rng.uniform(0.01, 0.6, 7)
    targets[0] = True
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
    expected = [scikit_learn_precision(targets[:, c], scores[:, c]) for c in range(7)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_a_class_without_images_is_nan_and_bad_scores_are_refused():
    targets = torch.zeros(5, 2, dtype=torch.bool)
    targets[1, 0] = True
    assert average_precision(torch.randn(5, 2), targets).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="NaN"):
        average_precision(torch.full((5, 2), torch.nan), targets)
    with pytest.raises(ValueError, match=r"\(5, 3\)"):
        average_precision(torch.randn(5, 3), targets)


@pytest.fixture
def lists(tmp_path):
    """A tag list, annotations (by name, and the same by position, without file endings), and 12 images."""
    (tmp_path / "imgs" / "test").mkdir(parents=True)
    rows, numbered = [], []
    for i in range(12):
        (tmp_path / "imgs" / "test" / f"{i:04x}.jpg").write_bytes(jpeg(i, 40))
        labels = [c for c in range(3) if (i >> c) & 1]
        rows.append(",".join([f"test/{i:04x}", *(CLASSES[c] for c in labels)]))
        numbered.append(",".join([f"test/{i:04x}.jpg", *(str(c) for c in labels)]))
    (tmp_path / "tags.txt").write_text("\n".join(CLASSES) + "\n")
    (tmp_path / "annots.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "numbered.txt").write_text("\n".join(numbered) + "\n")
    return tmp_path


def test_the_map_of_a_model(lists, model):
    classes = read_classes(lists / "tags.txt")
    labeled = read_labels(lists / "annots.txt", classes, lists / "imgs")
    assert labeled == read_labels(lists / "numbered.txt", classes, lists / "imgs")
    templates = ("a photo of a {c}.", "one {c}")
    found = evaluate_multi_label(model, labeled, classes, templates, "cpu", batch_size=5)
    from dreamlip_train.data.images import decode_image, resize_center_crop

    with torch.no_grad():
        images = torch.cat(
            [model.encode_images(resize_center_crop(decode_image(p.read_bytes()), 32)[None])[0] for p in labeled.images]
        )
        rows = []
        for line in CLASSES:
            prompts = [t.replace("{c}", name) for name in line.split("; ") for t in templates]
            rows.append(torch.cat([model.encode_texts(model.tokenize([p])) for p in prompts]).mean(dim=0))
        text = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
        torch.testing.assert_close(
            class_features(model, classes, templates, "cpu", batch_size=3), text, atol=1e-6, rtol=1e-5
        )
    targets = np.array([[c in labels for c in range(3)] for labels in labeled.labels])
    expected = [100 * scikit_learn_precision(targets[:, c], (images @ text.T).numpy()[:, c]) for c in range(3)]
    assert [found["per_class"][name] for name in CLASSES] == [
        *(pytest.approx(value, abs=1e-6) for value in expected),
        None,
    ]
    assert found["map"] == pytest.approx(np.mean(expected), abs=1e-6) and found["without_images"] == 1
    assert found["chance"] == pytest.approx(100 * targets.mean(), abs=1e-6)
    assert "1 classes that no image has" in format_multi_label(found)


def test_the_command(lists, tmp_path, capsys):
    torch.save(
        {"state_dict": build_model(ModelConfig(name="ViT-S-32-alt", local_logit_scale=False), 0).clip.state_dict()},
        tmp_path / "x.pt",
    )
    words = [
        "--annotations",
        str(lists / "annots.txt"),
        "--classes",
        str(lists / "tags.txt"),
        "--images",
        str(lists / "imgs"),
    ]
    cli.main(
        [
            "eval",
            "multilabel",
            str(tmp_path / "x.pt"),
            "--model",
            "ViT-S-32-alt",
            *words,
            "--output",
            str(tmp_path / "out.json"),
        ]
    )
    written = json.loads((tmp_path / "out.json").read_text())
    assert f"mAP, % (chance)  {written['map']:.1f}" in capsys.readouterr().out


def test_what_does_not_fit_is_named(lists, tmp_path):
    classes = read_classes(lists / "tags.txt")
    with pytest.raises(ValueError, match=r"annots.txt line 2: the label 'red star' is not among the 3 classes"):
        read_labels(lists / "annots.txt", classes[1:], lists / "imgs")
    with pytest.raises(ValueError, match="line 5: the label '2' is not among the 2 classes"):
        read_labels(lists / "numbered.txt", classes[:2], lists / "imgs")
    (lists / "imgs" / "test" / "0003.jpg").unlink()
    with pytest.raises(ValueError, match="1 of 12 images in .* are not there, such as test/0003"):
        read_labels(lists / "annots.txt", classes, lists / "imgs")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match="has 'a' twice"):
        read_classes(tmp_path / "twice.txt")
    with pytest.raises(ValueError, match="has no {c}"):
        read_templates(str(tmp_path / "twice.txt"))
    with pytest.raises(ValueError, match='give "photo", "imagenet" or a file'):
        read_templates("imagnet")
    assert len(read_templates("imagenet")) == 80 and read_templates("photo") == ("a photo of a {c}.",)


def test_published_lists_are_read_as_they_are(lists, tmp_path):
    """ImageNet-Multi and HICO give positions separated by spaces; ImageNet-Multi's tag list has two names twice."""
    classes = ["missile", "dog", "missile", "sunglasses", "12 bells", "sunglasses"]
    (tmp_path / "tags.txt").write_text("\n".join(classes))
    names = [line.split(",")[0] for line in (lists / "annots.txt").read_text().splitlines()][:3]
    (tmp_path / "annots.txt").write_text(f"{names[0]},0 2 3\n{names[1]},5\n{names[2]},dog,12 bells\n")
    read = read_classes(tmp_path / "tags.txt", repeated_allowed=True)
    assert read_labels(tmp_path / "annots.txt", read, lists / "imgs").labels == [[0, 2, 3], [5], [1, 4]]
    (tmp_path / "annots.txt").write_text(f"{names[0]},missile\n")
    with pytest.raises(ValueError, match="the label 'missile' is not among"):
        read_labels(tmp_path / "annots.txt", read, lists / "imgs")
