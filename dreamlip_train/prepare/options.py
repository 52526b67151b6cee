"""What ``dreamlip-train recaption`` can be told; each default is written here alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RecaptionOptions:
    """Write new long and short captions with a multimodal model.

    Started again, or on several machines at once, it shares the shards and goes on.
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
    """Images a forward pass, or requests under way at once."""
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
