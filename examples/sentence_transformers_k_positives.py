"""sentence-transformers with K positives per anchor: a question finds each of its topic's sentences.

python examples/sentence_transformers_k_positives.py
"""

import random
import tempfile

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from dreamlip_kernels.integrations.sentence_transformers import MultiPositiveRankingLoss

K = 3
TOPICS = {f"topic{i}": [f"word{i}{letter}" for letter in "abcdefgh"] for i in range(32)}


def rows(count: int, seed: int) -> Dataset:
    """An anchor column and K columns of positives: words of one topic."""
    draw = random.Random(seed)
    columns = {name: [] for name in ["anchor", *(f"positive_{k}" for k in range(K))]}
    for _ in range(count):
        words = draw.choice([*TOPICS.values()])
        for texts in columns.values():
            texts.append(" ".join(draw.sample(words, 3)))
    return Dataset.from_dict(columns)


def main() -> None:
    """Train word embeddings for 60 steps and print the loss."""
    words = ["<unk>", *(word for topic in TOPICS.values() for word in topic)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu")
    loss = MultiPositiveRankingLoss(model)  # was: MultipleNegativesRankingLoss(model)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=32,
        max_steps=60,
        learning_rate=0.05,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=rows(1024, 0), loss=loss)
    trainer.train()
    for line in trainer.state.log_history:
        if "loss" in line:
            print(f"step {line['step']:2d}   loss {line['loss']:.3f}")


if __name__ == "__main__":
    main()
