"""``eval retrieval-set``, ``long-retrieval`` and ``compositional``: captions and pictures that belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dreamlip_train.cli.evaluation.options import EvalOptions, Score, Show, parse, run
from dreamlip_train.evaluation import defaults


@dataclass(kw_only=True)
class RetrievalSetOptions(EvalOptions):
    """Recall on Flickr30k, COCO or a set in one of their layouts."""

    command: ClassVar[str] = "retrieval-set"

    annotations: str
    """Karpathy's json, COCO's captions json, or a clip_benchmark webdataset folder."""
    images: str = ""
    """Folder of the json's images."""
    split: str = defaults.SPLIT
    """Split of a Karpathy json or a clip_benchmark folder."""
    captions_per_image: int = defaults.CAPTIONS_PER_IMAGE
    """The first so many captions of each image; 0 takes all."""


def retrieval_set(arguments: list[str], program: str) -> None:
    """Recall on Flickr30k or COCO: CHECKPOINT --annotations FILE --images DIR"""
    options = parse(RetrievalSetOptions, arguments, program)
    run(options, *retrieval_set_job(options))


def retrieval_set_job(options: RetrievalSetOptions) -> tuple[Score, Show]:
    """Read the set; how it is scored and shown."""
    from dreamlip_train.evaluation.retrieval.retrieval_sets import evaluate_retrieval, format_retrieval, read_set

    items = read_set(options.annotations, options.images, options.split)

    def score(model: Any, _: Any, device: Any) -> dict[str, Any]:
        return evaluate_retrieval(
            model, items, device, captions_per_image=options.captions_per_image, batch_size=options.batch_size
        )

    return score, format_retrieval


@dataclass(kw_only=True)
class LongRetrievalOptions(EvalOptions):
    """Recall where captions are longer than the context, or an image has many sentences."""

    command: ClassVar[str] = "long-retrieval"

    set: Literal["docci", "docci-fine", "iiw", "iiw-fine", "dci", "urban1k", "sharegpt4v-1k", "sharegpt4v-10k"]
    """The set; NAME-fine is FLAIR's fine-grained variant, a text a sentence."""
    root: str
    """Folder of the set, as it is published (docs/evaluation.md)."""


def long_retrieval(arguments: list[str], program: str) -> None:
    """Recall by long captions (DOCCI, IIW, DCI, Urban1k, ShareGPT4V): CHECKPOINT --set NAME --root DIR"""
    options = parse(LongRetrievalOptions, arguments, program)
    run(options, *long_retrieval_job(options))


def long_retrieval_job(options: LongRetrievalOptions) -> tuple[Score, Show]:
    """Read the set; how it is scored and shown."""
    from dreamlip_train.evaluation.retrieval.long_caption_sets import read_long_captions
    from dreamlip_train.evaluation.retrieval.long_captions import evaluate_long_captions, format_long_captions

    captions = read_long_captions(options.set, options.root)

    def score(model: Any, _: Any, device: Any) -> dict[str, Any]:
        return evaluate_long_captions(model, captions, device, batch_size=options.batch_size)

    return score, format_long_captions


@dataclass(kw_only=True)
class CompositionalOptions(EvalOptions):
    """Captions, or pictures, that differ in how their parts are put together."""

    command: ClassVar[str] = "compositional"

    set: Literal["sugarcrepe", "winoground", "aro-relation", "aro-attribution", "mmvp"]
    """The set."""
    root: str
    """Folder of the set, as it is published (docs/evaluation.md)."""
    images: str = ""
    """SugarCrepe's pictures, COCO's val2017; empty means val2017 below --root."""


def compositional(arguments: list[str], program: str) -> None:
    """SugarCrepe, Winoground, ARO and MMVP-VLM: CHECKPOINT --set NAME --root DIR"""
    options = parse(CompositionalOptions, arguments, program)
    run(options, *compositional_job(options))


def compositional_job(options: CompositionalOptions) -> tuple[Score, Show]:
    """Read the set; how it is scored and shown."""
    from dreamlip_train.evaluation.compositional.scoring import evaluate_cases, format_cases
    from dreamlip_train.evaluation.compositional.sets import read_cases

    cases = read_cases(options.set, options.root, options.images)

    def score(model: Any, _: Any, device: Any) -> dict[str, Any]:
        return evaluate_cases(model, options.set, cases, device, batch_size=options.batch_size)

    return score, format_cases
