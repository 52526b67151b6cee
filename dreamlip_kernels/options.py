"""The values that options take, as types: what is checked at run time is read from them."""

from typing import Literal

Negatives = Literal["slot", "all"]
Positives = Literal["mean", "logsum"]
Reduction = Literal["mean", "sum", "none"]
SumOrMean = Literal["mean", "sum"]
Pairs = Literal["softmax", "sigmoid"]
Normalization = Literal["minmax", "softmax", "none"]
Contrast = Literal["image", "batch", "conditioned"]
Direction = Literal["both", "t2v"]
DistImpl = Literal["bidir", "shift", "reduce", "gather"]
ContrastiveBackend = Literal["auto", "torch", "triton", "cuda"]
SigmoidBackend = Literal["auto", "torch", "triton"]
GroupingBackend = Literal["auto", "cpp", "torch", "triton", "cuda"]
Backend = GroupingBackend
