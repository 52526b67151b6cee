"""Nothing that a model's folder, a data set's folder or a shard brings along is run."""

import io
import json
import sys

import pytest
from shard_files import sample, tokenize, write_index, write_tar

from dreamlip_train.captions.formats.hub import HubTable
from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.loader import train_loader
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.recaption.captioners import LocalModel


class Asked(io.TextIOBase):
    """A standard input on which nothing may be asked."""

    def read(self, *_):
        raise AssertionError("something was asked on standard input")

    readline = read


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    """A program that says when it is run, as text."""
    monkeypatch.setattr(sys, "stdin", Asked())
    yield f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass P: pass\n"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "processor_config.json"])
def test_code_of_a_model_folder_is_not_run_and_nothing_is_asked(tmp_path, nothing_runs, file):
    """transformers asks on standard input whether to run it, which blocks a job and reads from its user."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "own"}))
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoProcessor": "code.P"}}
    (folder / file).write_text(json.dumps(own))
    (folder / "code.py").write_text(nothing_runs)
    with pytest.raises(UserError, match="--model: .*(--trust-remote-code|that transformers can load)"):
        LocalModel(str(folder), [])


def test_a_script_in_a_data_set_is_not_run(tmp_path, nothing_runs):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(nothing_runs)
    (folder / "train.jsonl").write_text(json.dumps({"Image Path": "1.jpg", "raw_caption": "a dog"}) + "\n")
    with pytest.raises(UserError, match="--captions: datasets can't load"):
        list(HubTable(f"hf:{folder}"))
    (folder / "set.py").unlink()
    assert len(list(HubTable(f"hf:{folder}"))) == 1


def test_a_poisoned_member_is_never_executed(tmp_path):
    """webdataset's .decode() unpickles .pyd members; here a member is bytes."""
    poison = b"cos\nsystem\n(S'touch " + str(tmp_path / "executed").encode() + b"'\ntR."
    write_tar(
        tmp_path / "00000.tar",
        [m for i in range(8) for m in [*sample(f"{i}", i), (f"{i}.pyd", poison), (f"{i}.pkl", poison)]],
    )
    write_index(tmp_path, [8])
    config = DataConfig(shards=str(tmp_path), num_workers=0, shuffle_buffer=4)
    (batch,) = train_loader(config, image_size=16, tokenize=tokenize, batch_size=8).epoch(0)
    assert len(batch["keys"]) == 8
    assert not (tmp_path / "executed").exists()
