"""Every example runs as its first lines say, and its loss goes down."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import clean_environment

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NEEDS = {
    "transformers_trainer": ("transformers", "accelerate"),
    "sentence_transformers_k_positives": ("sentence_transformers", "datasets"),
    "lightning_k_captions": ("lightning", "open_clip"),
    "accelerate_k_captions": ("accelerate", "open_clip"),
    "open_clip_k_captions": ("open_clip_train", "pandas"),
    "train_on_own_images": ("deepspeed",),
}


def losses(words: list[str], tmp_path: Path, *before: str) -> list[float]:
    """Run an example in an empty folder, with these folders before others on the path; the losses it prints."""
    environment = clean_environment() | {
        "PYTHONPATH": os.pathsep.join([*before, str(ROOT)]),
        "EXAMPLE_FOLDER": str(tmp_path / "data"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [
        float(value)
        for value in re.findall(r"(?:step +\d+(?:/\d+)? +loss|\bLoss:) ([\d.]+)", done.stdout + done.stderr)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["open_clip_loss", *NEEDS])
def test_it_runs_and_learns(name, tmp_path):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module, reason="the integrations extra is not installed")
    seen = losses([sys.executable, str(EXAMPLES / f"{name}.py")], tmp_path)
    assert len(seen) >= 3 and seen[-1] < seen[0], seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--accum-freq 2 --local-loss --gather-with-grad --grad-checkpointing --precision amp_bf16",
        "--local-loss --gather-with-grad",
    ],
)
def test_open_clips_program_over_two_ranks(flags, tmp_path):
    pytest.importorskip("pandas", reason="the integrations extra is not installed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    seen = losses([*launch, str(EXAMPLES / "open_clip_k_captions.py"), *flags.split()], tmp_path)
    assert len(seen) >= 2 and seen[-1] < seen[0], seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--accum-freq 2 --local-loss --gather-with-grad --grad-checkpointing --precision amp_bf16 --epochs 3",
        "--local-loss --gather-with-grad --torchcompile --torchcompile-backend aot_eager",
    ],
)
def test_open_clips_newest_program_over_two_ranks(flags, tmp_path):
    """Its task classes, in no release yet: OPEN_CLIP_SOURCE is the folder src of a checkout of its main branch."""
    source = os.environ.get("OPEN_CLIP_SOURCE")
    if not source:
        pytest.skip("OPEN_CLIP_SOURCE does not name the folder src of an open_clip checkout")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    seen = losses([*launch, str(EXAMPLES / "open_clip_k_captions.py"), *flags.split()], tmp_path, source)
    assert len(seen) >= 2 and seen[-1] < seen[0], seen
