"""What the commands that write shards can be told; each default is written here alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ScenesOptions:
    """Render the built-in demo world: pictures, masks and DreamLIP's caption columns."""

    output: str
    """Folder for train/ and val/, each with images/, masks/ and captions.csv."""
    num_train: int = 6000
    """Training scenes."""
    num_val: int = 200
    """Held-out scenes."""
    seed: int = 0
    """Another seed, another world."""


@dataclass
class FolderOptions:
    """Turn a caption table and a folder of images into shards and a manifest.json. A killed run resumes."""

    captions: str
    """CSV, TSV, parquet, JSON or JSON lines, plain, .gz or .zst; `prepare validate FILE` says what it is taken for. Or
    hf:NAME:SPLIT, a data set of the Hugging Face hub (or a folder of its layout), which is streamed.
    """
    output: str
    """Folder for the shards."""
    images: str | None = None
    """Folder of images, searched in depth; not needed where the table has the pictures inside."""
    columns: tuple[str, ...] = ()
    """What the table calls them, as OURS=THEIRS words: --columns url=URL long=re_caption raw=alt."""
    masks: str | None = None
    """Folder of label maps STEM.png: value j is the region that sentence j of each long caption describes."""
    shard_size: int = 1000
    """Rows per shard."""


@dataclass
class JoinOptions:
    """Join caption tables to existing image shards: new shards whose json carries every caption.
    A killed run resumes.
    """

    captions: str
    """Tables (CSV, TSV, parquet, JSON, JSON lines): a file, folder or glob, several joined with "::";
    the first that knows a caption gives it.
    """
    shards: str
    """Image shards: a folder, glob or brace pattern. They are only read."""
    output: str
    """Folder for the new shards, which keep their names."""
    on: str = "url"
    """What joins them: "url", "path" or "key", or the name of a json field of the samples and column of the tables."""
    table_column: str = ""
    """The tables' column that is compared, if it is called otherwise ("Image Path" for url and path)."""
    columns: tuple[str, ...] = ()
    """What the tables call them, as OURS=THEIRS words (or OURS THEIRS pairs): --columns longSV=caption_long raw=alt."""
    matched_only: bool = False
    """Leave out samples that no table knows."""
    memory_limit: str = "3GB"
    """Memory of the join, which goes to disk beyond it."""
    ray: str = ""
    """Run on the Ray cluster at this address ("auto": this machine's); all nodes must see the same files."""


@dataclass
class RecaptionOptions:
    """Write new long and short captions with a multimodal model.

    Started again, or on several machines at once, it shares the shards and resumes.
    """

    shards: str
    """Image shards: a folder, glob or brace pattern. They are only read."""
    output: str
    """Folder for the new shards, which keep their names."""
    model: str
    """A Hugging Face image-text-to-text model (a folder or a name), or with --endpoint the name under which the server
    serves one.
    """
    trust_remote_code: bool = False
    """Run the Python files that a --model folder brings along ("auto_map" in its config).
    They can do anything you can.
    """
    name: str = "LLA"
    """Captions go to the columns short{name}_captions and long{name}_captions: IB, SV, LLA, or your own."""
    endpoint: str = ""
    """Base URL of an OpenAI-compatible server, such as vLLM's http://host:8000/v1; empty runs the model here.
    OPENAI_API_KEY is its key.
    """
    long_prompt: str = "Describe the image in details"
    """Asks for the long caption; empty leaves it out."""
    short_prompt: str = "Describe the image in short."
    """Asks for the short caption; empty leaves it out."""
    summary_prompt: str = ""
    """Asks for both at once, in place of the two above: the answer's first sentence is the short caption, the others
    are the long one. Such as "Summarize the image in one sentence, then describe its details in one sentence each."
    """
    keep_above: float | None = None
    """Leave out sentences whose cosine with the picture is lower by --clip-model, as hallucinations are; 0.2 or so for
    OpenAI's CLIP. The scores of all sentences are kept in each sample's json (longNAME_scores, shortNAME_scores).
    """
    clip_model: str = "ViT-B-32"
    """The judge of --keep-above: an open_clip folder, as `dreamlip-train export` writes it, or a name of open_clip's
    table with --clip-weights.
    """
    clip_weights: str = ""
    """An open_clip weights file of the named --clip-model."""
    max_tokens: int = 256
    """Length of a long caption; a short one gets a quarter of it."""
    batch_size: int = 16
    """Images per forward pass, or images that a server is asked about at once."""
    timeout: float = 120.0
    """Seconds a request may take."""
    retries: int = 5
    """Further attempts at an image, the pauses doubling from one second."""
    max_bad_fraction: float = 0.05
    """Stop when more than this fraction of the images could not be captioned."""
    stale_minutes: float = 30.0
    """A shard whose worker has not been heard of for so long is taken over."""
    ray: str = ""
    """Run on the Ray cluster at this address ("auto": this machine's); all nodes must see the same files."""
