"""The quickstart's first story: text classification, few labels, many texts.

The text is the standard library's own source (`corpus.py`). The question: which package is a passage from? The
setting is one in which distillation pays: few rows have a label, the others only what the teacher makes of them. With
every row labelled there would be little to gain.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .corpus import FAMILIES, passages, read_rows, write_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .quickstart import QuickstartConfig


class LabelStory:
    """Folder `folder`: data, teacher and student.json are made there."""

    auto_class = "AutoModelForSequenceClassification"
    measure = "accuracy"
    metric = "eval_accuracy"
    data = "Text: passages of Python's standard library, labelled by the package they are from."
    teacher = "Teacher: a small BERT, trained on every label. This takes the longest."
    dumping = "Dump: the teacher runs once over every row, labelled or not."
    kinds: Mapping[str, dict[str, Any]] = {"labels": {"alpha": 0.0}, "distilled": {"alpha": 0.9}}
    dump_settings: Mapping[str, Any] = {}
    learning_rate, batch_size = 3e-3, 32
    sizes: Mapping[str, Any] = {
        "rows": 5000, "labelled": 250, "validation_rows": 1500, "vocabulary": 4000, "teacher_epochs": 5,
        "student_steps": 600,
    }  # fmt: skip
    query = "SELECT label, avg(teacher_entropy) FROM samples GROUP BY label"

    def __init__(self, folder: Path, config: QuickstartConfig):
        self.folder, self.config = folder, config

    @property
    def names(self) -> dict[str, str]:
        return {"labels": f"student, {self.config.labelled} labels", "distilled": "student, the same and the teacher"}

    def counted(self, counts: dict[str, int]) -> str:
        return (f"{counts['training']} to train on, of which {counts['labelled']} keep their label; "
                f"{counts['validation']} of other modules to validate on.")  # fmt: skip

    def told(self, rows: dict[str, int], seeds: int) -> str:
        return (
            f"accuracy: on {rows['validation']} passages of modules that nobody was trained on; mean and standard\n"
            f"deviation over {seeds} seeds. Both students see {rows['labelled']} labels; "
            "the distilled one also learns from\n"
            f"the teacher's answers to all {rows['training']} passages. That is where distillation pays: "
            "many rows, few\nlabels. With a label on every row, expect little."
        )

    def teacher_reached(self, store: Any) -> float:
        right = "SELECT avg((label = teacher_prediction)::INT) FROM samples WHERE split = 'validation'"
        [(found,)] = store.sql(right).fetchall()
        return found

    def write_data(self) -> dict[str, int]:
        """all.jsonl has every label, train.jsonl few of them, validation.jsonl is other modules."""
        folder, config = self.folder / "data", self.config
        training, validation = (
            sorted(rows, key=_digest)[:count]
            for rows, count in zip(passages(), (config.rows, config.validation_rows), strict=True)
        )
        kept = set(random.Random(0).sample(range(len(training)), min(config.labelled, len(training))))
        few = [{**row, "label": row["label"] if at in kept else None} for at, row in enumerate(training)]
        for name, rows in (("all", training), ("train", few), ("validation", validation)):
            write_rows(folder / f"{name}.jsonl", rows)
        return {"training": len(training), "labelled": len(kept), "validation": len(validation)}

    def train_teacher(self) -> None:
        """A tokenizer and a BERT of 2 layers, 128 wide, saved to folder/teacher."""
        from transformers import BertForSequenceClassification, DataCollatorWithPadding, set_seed

        from .quickstart import fit

        rows, names = read_rows(self.folder / "data/all.jsonl"), list(FAMILIES)
        tokenizer = train_tokenizer([row["text"] for row in rows], self.config.vocabulary)
        encoded = tokenizer([row["text"] for row in rows], truncation=True)["input_ids"]
        labels = [names.index(row["label"]) for row in rows]
        samples = [{"input_ids": ids, "labels": label} for ids, label in zip(encoded, labels, strict=True)]
        set_seed(0)
        model = BertForSequenceClassification(bert(128, 2, tokenizer, names))
        fit(model, samples, tokenizer, DataCollatorWithPadding(tokenizer), self.folder / "teacher",
            self.config.teacher_epochs, 1e-3, self.batch_size)  # fmt: skip
        bert(64, 1, tokenizer, names).to_json_file(self.folder / "student.json")


def _digest(row: dict[str, str]) -> bytes:
    return hashlib.sha256(row["text"].encode()).digest()


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """WordPiece, lower case, at most 64 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special,
                                                              show_progress=False))  # fmt: skip
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, special.index(name)) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def bert(width: int, layers: int, tokenizer: PreTrainedTokenizerFast, names: list[str]) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=2 * width, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(names)), label2id={name: at for at, name in enumerate(names)},
        architectures=["BertForSequenceClassification"],
    )  # fmt: skip
