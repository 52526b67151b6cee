"""What ``dreamlip-train ablate`` can be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class AblationOptions:
    """Train the paper's ablations on the built-in scenes, and write one table and plot. Started again, it resumes."""

    output: str
    """Folder for the data, the runs, and ablation.{json,md,png}."""
    only: tuple[str, ...] = ()
    """Variants to run; empty means all."""
    seeds: int = 3
    """Seeds of weights and draws."""
    steps: int = 600
    """Steps of each run."""
    batch_size: int = 128
    """Images per step."""
    num_train: int = 6000
    """Training scenes."""
    num_val: int = 400
    """Held-out scenes."""
    jobs: int = 1
    """Runs at a time."""
