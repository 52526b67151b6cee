"""The values that options take, as types: what is checked at run time is read from them."""

from typing import Literal, get_args

Negatives = Literal["slot", "all"]
Positives = Literal["mean", "logsum"]
Reduction = Literal["mean", "sum", "none"]
Pairs = Literal["softmax", "sigmoid"]
Normalization = Literal["minmax", "softmax", "none"]
Contrast = Literal["image", "batch", "conditioned"]
Direction = Literal["both", "t2v"]
DistImpl = Literal["bidir", "shift", "reduce", "gather"]
ContrastiveBackend = Literal["auto", "torch", "triton", "cuda"]
SigmoidBackend = Literal["auto", "torch", "triton"]
GroupingBackend = Literal["auto", "cpp", "torch", "triton", "cuda"]
Backend = GroupingBackend

# What checks compare with: torch.compile of torch 2.6 cannot trace get_args.
NEGATIVES: tuple[str, ...] = get_args(Negatives)
POSITIVES: tuple[str, ...] = get_args(Positives)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
PAIRS: tuple[str, ...] = get_args(Pairs)
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)
CONTRASTS: tuple[str, ...] = get_args(Contrast)
DIRECTIONS: tuple[str, ...] = get_args(Direction)
DIST_IMPLS: tuple[str, ...] = get_args(DistImpl)
