"""One prompt for a summary and its details; sentences that CLIP does not find in the picture are left out."""

import json
from pathlib import Path

import pytest
from chat_server import ChatServer, number, through
from safetensors.torch import save_file
from shard_files import records
from tiny import TOWERS, tiny_model

from dreamlip_train.captions.columns import split_sub_captions
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.build import build_model
from dreamlip_train.model.open_clip_weights import open_clip_state_dict
from dreamlip_train.prepare.recaption import captioners


def test_a_summary_and_its_details_are_asked_for_at_once(tmp_path, shards):
    with ChatServer() as server:
        counts = through(server, shards, tmp_path / "out", summary_prompt="Describe in detail")
        assert counts["captioned"] == 24 and len(server.requests) == 24
        assert through(server, shards, tmp_path / "out", summary_prompt="Describe in detail") == {"done before": 3}
    record = records(tmp_path / "out")["0003"]
    assert record["shortX_captions"] == f"Picture {number(3)}."
    assert record["longX_captions"] == "It has details. And a half sent"
    prompt = captioners.Prompt("long", "?", 9, summary_column="short")
    assert prompt.captions("One. Two is cu", True) == {"short": "One.", "long": "One."}


@pytest.fixture
def clip_folder(tmp_path) -> Path:
    folder = tmp_path / "clip"
    folder.mkdir()
    model = build_model(tiny_model(), seed=3)
    settings = TOWERS | {"text_cfg": TOWERS["text_cfg"] | {"context_length": 16}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    save_file(open_clip_state_dict(model), folder / "open_clip_model.safetensors")
    return folder


def test_sentences_that_clip_does_not_find_in_the_picture_are_left_out(tmp_path, shards, clip_folder):
    options = {"clip_model": str(clip_folder), "short_prompt": ""}
    with ChatServer() as server:
        through(server, shards, tmp_path / "all", keep_above=-1.0, **options)
        found = records(tmp_path / "all")
        scores = sorted(score for record in found.values() for score in record["longX_scores"])
        limit = scores[len(scores) // 2]
        through(server, shards, tmp_path / "half", keep_above=limit, **options)
        with pytest.raises(UserError, match="--output: .* holds captions of other"):
            through(server, shards, tmp_path / "half", keep_above=0.1, **options)
        with pytest.raises(UserError, match="--keep-above, --clip-model"):
            through(server, shards, tmp_path / "none", keep_above=0.1)
    left = 0
    for key, record in records(tmp_path / "half").items():
        sentences = split_sub_captions(found[key]["longX_captions"])
        assert record["longX_scores"] == found[key]["longX_scores"] and len(sentences) == 3
        kept = split_sub_captions(record["longX_captions"])
        assert all(
            (text in kept) == (score > limit)
            for text, score in zip(sentences, record["longX_scores"], strict=True)
            if abs(score - limit) > 1e-3
        )
        left += len(sentences) - len(kept)
    assert 20 < left < 52  # of 72
