"""A model of transformers captions pictures: whatever a picture is, and without running a folder's code."""

import pytest
from shard_files import jpeg, records
from tiny_captioners import FAMILIES, save_tiny
from tiny_llava import WORDS, save_tiny_llava

from dreamlip_train import cli
from dreamlip_train.prepare.recaption import captioners


def test_a_local_model_end_to_end(tmp_path, shards, llava):
    words = [
        "recaption",
        str(shards),
        "--output",
        str(tmp_path / "out"),
        "--model",
        llava,
        "--name",
        "LLA",
        "--max-tokens",
        "24",
    ]
    cli.main([*words, "--batch-size", "3", "--max-bad-fraction", "1"])
    found = records(tmp_path / "out")
    captioned = [record["longLLA_captions"] for record in found.values() if "longLLA_captions" in record]
    assert len(found) == 24 and len(captioned) >= 16 and len(set(captioned)) > 8  # what it says depends on the picture
    alone = captioners.LocalModel(llava, [captioners.Prompt("longLLA_captions", "Describe the image in details", 24)])
    for key in list(found)[:6]:
        (answer,) = alone.answer([jpeg(int(key))])
        if "longLLA_captions" in found[key]:
            assert answer == {"longLLA_captions": found[key]["longLLA_captions"]}  # as in a batch


def test_a_damaged_picture_spoils_no_other(llava):
    model = captioners.LocalModel(llava, [captioners.Prompt("c", "Describe the image in details", 24)])
    whole, damaged, other = model.answer([jpeg(0), b"no picture", jpeg(3)])
    assert isinstance(damaged, ValueError)
    assert [whole, other] == model.answer([jpeg(0), jpeg(3)])


def test_without_a_chat_template_llava_gets_its_own_form(tmp_path):
    model = captioners.LocalModel(str(save_tiny_llava(tmp_path, chat_template=False)), [])
    assert model._question("Describe the image in details") == "USER: <image>\nDescribe the image in details ASSISTANT:"


@pytest.mark.parametrize("family", FAMILIES)
def test_current_captioners_are_asked_through_their_own_classes(family, tmp_path):
    """Their processors, templates and generation; weights are random, so that any words will do."""
    model = captioners.LocalModel(str(save_tiny(family, tmp_path)), [captioners.Prompt("c", "Describe the image", 6)])
    assert family.replace("-", "").lower() in type(model.model).__name__.lower()
    one, two = model.answer([jpeg(1, 60), jpeg(2, 90)])
    assert {word for answer in (one, two) for word in answer["c"].split()} <= set(WORDS), "without the question"
    assert model.answer([jpeg(2, 90)]) == [two]  # padding does not show
