"""The quickstart's second story: a language model of Python source, and a smaller one that learns from it.

The teacher reads all rows, the students few of them: both take the same steps over the same rows, one with the
teacher's top-k logits beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .corpus import code, read_rows, write_rows

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from .quickstart import QuickstartConfig

LENGTH = 256  # tokens
FEW = "source_index < 300"


class LanguageStory:
    """Folder `folder`: data, teacher and student.json are made there."""

    auto_class = "AutoModelForCausalLM"
    measure = "loss"
    metric = "eval_loss_labels"
    data = "Text: source of Python's standard library, as it stands."
    teacher = "Teacher: a small Llama. This takes the longest."
    dumping = "Dump: the teacher runs once over every row; the 32 most likely next tokens of each position are kept."
    kinds: Mapping[str, dict[str, Any]] = {
        "labels": {"alpha": 0.0, "where": FEW},
        "distilled": {"alpha": 0.9, "temperature": 1.0, "where": FEW},
    }
    dump_settings: Mapping[str, Any] = {"top_k_logits": 32}
    learning_rate, batch_size = 4e-3, 16
    sizes: Mapping[str, Any] = {
        "rows": 2000, "validation_rows": 300, "vocabulary": 2000, "teacher_epochs": 3, "student_steps": 300,
    }  # fmt: skip
    query = "SELECT module, avg(teacher_loss) FROM samples GROUP BY module ORDER BY 2 LIMIT 5"
    names: Mapping[str, str] = {"labels": "student, 300 rows", "distilled": "student, the same and the teacher"}

    def __init__(self, folder: Path, config: QuickstartConfig):
        self.folder, self.config = folder, config

    def counted(self, counts: dict[str, int]) -> str:
        return f"{counts['training']} rows to train on, {counts['validation']} of other modules to validate on."

    def told(self, rows: dict[str, int], seeds: int) -> str:
        return (
            f"loss: nats a token on {rows['validation']} rows of modules that nobody was trained on; mean and\n"
            f"standard deviation over {seeds} seeds. The teacher read {rows['training']} rows. Both students read the "
            "same 300 of them,\nin the same steps; one also learns which other tokens the teacher thought likely."
        )

    def teacher_reached(self, store: Any) -> float:
        """Exact: the label's own log-probability is stored at every position."""
        rows = "FROM samples WHERE split = 'validation'"
        [(found,)] = store.sql(f"SELECT sum(teacher_loss * (num_tokens - 1)) / sum(num_tokens - 1) {rows}").fetchall()
        return found

    def write_data(self) -> dict[str, int]:
        limits = {"train": self.config.rows, "validation": self.config.validation_rows}
        counts = {}
        for (split, limit), rows in zip(limits.items(), code(), strict=True):
            chosen = sorted(rows, key=lambda row: hashlib.sha256(row["text"].encode()).digest())[:limit]
            write_rows(self.folder / "data" / f"{split}.jsonl", chosen)
            counts["training" if split == "train" else split] = len(chosen)
        return counts

    def train_teacher(self) -> None:
        """A byte-level tokenizer and a Llama of 3 layers, 128 wide, saved to folder/teacher."""
        from transformers import DataCollatorForLanguageModeling, LlamaForCausalLM, set_seed

        from .quickstart import fit

        texts = [row["text"] for row in read_rows(self.folder / "data/train.jsonl")]
        tokenizer = train_tokenizer(texts, self.config.vocabulary)
        encoded = tokenizer(texts, truncation=True, max_length=LENGTH - 1)["input_ids"]
        samples = [{"input_ids": [*ids, tokenizer.eos_token_id]} for ids in encoded]
        set_seed(0)
        model = LlamaForCausalLM(llama(128, 3, tokenizer))
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        fit(model, samples, tokenizer, collator, self.folder / "teacher", self.config.teacher_epochs, 3e-3,
            self.batch_size)  # fmt: skip
        llama(64, 1, tokenizer).to_json_file(self.folder / "student.json")


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", model_max_length=LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def llama(width: int, layers: int, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, intermediate_size=2 * width, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
