"""Where data and oracles are, and the tiny models that tests are made of."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and its children, ignore Ctrl-C
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch, here and in child processes: the models are tiny
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in every run; others are looked for by hand: pytest --hypothesis-profile search
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", max_examples=5000, deadline=None)
hypothesis.settings.load_profile("same")

ROOT = Path(__file__).resolve().parent.parent
TEXTS = (
    "a warm and funny film",
    "the plot is thin and the jokes are old",
    "one of the best performances of the year",
    "it never finds its rhythm and overstays its welcome",
    "charming, clever and a little sad",
    "dull from the first scene to the last",
)


def _shared(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / name)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set {variable} to where it is")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Small real datasets (PREDISTILL_DATA)."""
    return _shared("PREDISTILL_DATA", "data")


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    """Recorded outputs of the original losses (PREDISTILL_ORACLES)."""
    return _shared("PREDISTILL_ORACLES", "oracles")


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT-like fast tokenizer over the words of TEXTS, letters for all others."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = sorted({word.strip(",") for text in TEXTS for word in text.split()})
    vocab = {
        token: at for at, token in enumerate(dict.fromkeys([*special, *letters, *(f"##{c}" for c in letters), *words]))
    }
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher_dir(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT classifier of two layers and two labels, 16 wide, with its tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=2,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("teacher")
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
