"""Hugging Face's CLIPModel under the Trainer, with K captions per image and sub-caption grouping.

    python examples/transformers_trainer.py
    torchrun --nproc-per-node 2 examples/transformers_trainer.py

The whole batch meets in the loss while the towers hold the activations of ``chunk_size`` images: this replaces
``gradient_accumulation_steps``, under which each small batch would be contrasted with itself alone.
"""

import tempfile

import tiny_world
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import Dataset
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from dreamlip_kernels.integrations.transformers import SubCaptionCLIP, SubCaptionCollator

K = 3


class Pictures(Dataset):
    """Pictures with captions, as rows of a data set."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        image, caption = tiny_world.picture(index)
        return {"image": image, "text": caption}


def tiny_processor() -> CLIPProcessor:
    """A word tokenizer and an image processor; with weights of your own, CLIPProcessor.from_pretrained."""
    words = sorted({w for i in range(500) for w in tiny_world.picture(i)[1].replace(".", " .").split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<start>", *words, "<unk>", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", model_max_length=16
    )
    size = {"height": 32, "width": 32}
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), fast)


def tiny_model(processor: CLIPProcessor) -> CLIPModel:
    """A CLIPModel small enough for a CPU; with weights of your own, CLIPModel.from_pretrained."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    tokenizer = processor.tokenizer
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=32))


def main() -> None:
    """Train for thirty steps and print the loss."""
    processor = tiny_processor()
    model = SubCaptionCLIP(tiny_model(processor), chunk_size=16)  # 1
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=64,
        max_steps=30,
        learning_rate=3e-3,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
    )
    collator = SubCaptionCollator(processor, K)  # 2
    trainer = Trainer(model, arguments, train_dataset=Pictures(512), data_collator=collator)
    trainer.train()
    for line in trainer.state.log_history:
        if "loss" in line:
            print(f"step {line['step']:2d}   loss {line['loss']:.3f}")


if __name__ == "__main__":
    main()
