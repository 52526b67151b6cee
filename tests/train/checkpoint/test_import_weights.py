"""Weights from open_clip, from a folder of open_clip or transformers, come in unchanged;
another model, activation or file is named.
"""

import json

import open_clip
import pytest
import torch

from dreamlip_train import cli
from dreamlip_train.checkpoint.interoperability.import_weights import import_weights
from dreamlip_train.checkpoint.weights import load_for_eval

NAME = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same weights as a file with DDP's prefix, a bare safetensors file, an open_clip folder and a transformers
    folder.
    """
    from safetensors.torch import save_file

    from dreamlip_train.checkpoint.interoperability.export import export_checkpoint

    folder = tmp_path_factory.mktemp("sources")
    state = open_clip.create_model(NAME).state_dict()
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / "ddp.pt"
    )
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "bare.safetensors")
    torch.save({"state_dict": state}, folder / "plain.pt")
    for to in ("open_clip-dir", "hf-dir"):
        export_checkpoint(folder / "plain.pt", folder / to, to, NAME)
    return folder, state


@pytest.mark.parametrize("source", ["ddp.pt", "bare.safetensors", "open_clip-dir", "hf-dir"])
def test_every_source_gives_the_same_weights(sources, tmp_path, source, capsys):
    folder, state = sources
    name = [] if source.endswith("-dir") else ["--model", NAME]
    cli.main(["import", str(folder / source), *name, "--output", str(tmp_path / "in.pt")])
    printed = capsys.readouterr().out
    assert (
        f"{NAME}, {len(state)} tensors, GELU" in printed
        and f"--model.name {NAME} --model.pretrained {tmp_path / 'in.pt'}" in printed
    )
    model, _ = load_for_eval(tmp_path / "in.pt", NAME)
    assert all(torch.equal(model.clip.state_dict()[key].reshape(value.shape), value) for key, value in state.items())
    open_clip.create_model(NAME, pretrained=str(tmp_path / "in.pt"))  # a strict load


def test_openais_archives_have_another_activation(tmp_path):
    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logit_scale = torch.nn.Parameter(torch.ones([]))

        def forward(self, x):
            return x * self.logit_scale

    torch.jit.script(Towers()).save(str(tmp_path / "openai.pt"))
    with pytest.raises(ValueError, match="QuickGELU activations and ViT-B-32 has GELU; give ViT-B-32-quickgelu"):
        import_weights(tmp_path / "openai.pt", tmp_path / "x.pt", "ViT-B-32")
    with pytest.raises(ValueError, match="WEIGHTS: .* comes from another model: .* is missing"):
        import_weights(tmp_path / "openai.pt", tmp_path / "x.pt", "ViT-B-32-quickgelu")
    assert not (tmp_path / "x.pt").exists()


def test_a_folder_with_quickgelu_is_not_taken_for_a_gelu_model(sources, tmp_path):
    folder, _ = sources
    changed = tmp_path / "quick"
    changed.mkdir()
    config = json.loads((folder / "hf-dir" / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        config[tower]["hidden_act"] = "quick_gelu"
    (changed / "config.json").write_text(json.dumps(config))
    (changed / "model.safetensors").write_bytes((folder / "hf-dir" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=rf"is not {NAME}: activation 'QuickGELU' \(there\) and 'GELU'"):
        import_weights(changed, tmp_path / "x.pt", NAME)
    with pytest.raises(ValueError, match="open_clip has no model built like"):
        import_weights(changed, tmp_path / "x.pt")


def test_what_cannot_be_imported_is_named(sources, tmp_path):
    folder, state = sources
    with pytest.raises(ValueError, match="--model: say which open_clip model"):
        import_weights(folder / "plain.pt", tmp_path / "x.pt")
    with pytest.raises(ValueError, match="embed_dim 256 .there. and 384 .ViT-S-32."):
        import_weights(folder / "hf-dir", tmp_path / "x.pt", "ViT-S-32")
    with pytest.raises(ValueError, match="WEIGHTS: .* comes from another model: "):
        import_weights(folder / "plain.pt", tmp_path / "x.pt", "ViT-B-32")
    (tmp_path / "cut.pt").write_bytes(b"PK cut")
    with pytest.raises(ValueError, match="can't be read as tensors only"):
        import_weights(tmp_path / "cut.pt", tmp_path / "x.pt", NAME)
    torch.save({"state_dict": state, "args": object}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="can't be read as tensors only"):
        import_weights(tmp_path / "code.pt", tmp_path / "x.pt", NAME)
    with pytest.raises(ValueError, match="no file or folder"):
        import_weights(tmp_path / "none", tmp_path / "x.pt", NAME)
    (tmp_path / "x.pt").write_text("mine")
    with pytest.raises(ValueError, match="exists; give a new file"):
        import_weights(folder / "plain.pt", tmp_path / "x.pt", NAME)
    assert (tmp_path / "x.pt").read_text() == "mine" and not list(tmp_path.glob("*.partial"))
