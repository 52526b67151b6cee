"""What the commands that write shards can be told; each default is written here alone."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """CSV, TSV, parquet, JSON or JSON lines with "Image Path" and DreamLIP's caption columns."""
    images: str
    """Folder of images, searched in depth."""
    output: str
    """Folder for the shards."""
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
    columns: dict[str, str] = field(default_factory=dict)
    """Captions under other names, as OURS THEIRS pairs: --columns longSV_captions caption_long raw_caption alt."""
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
    max_tokens: int = 256
    """Length of a long caption; a short one gets a quarter of it."""
    batch_size: int = 16
    """Images per forward pass, or requests under way at once."""
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
