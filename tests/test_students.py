"""Where students come from, and which are refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from classification_store import random_rows, write_store
from predistill.store.errors import ConfigError, DataError
from predistill.student_train.settings import TrainConfig
from predistill.student_train.students import build_student, layer_state, parse_layers, teacher_folder
from predistill.student_train.tokens import check_positions, check_vocabulary, position_limit
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)


@pytest.fixture(scope="module")
def store(tiny_tokenizer_dir, tiny_teacher_dir, tmp_path_factory):
    rows = {"train": random_rows(8)}
    return write_store(
        tmp_path_factory.mktemp("store") / "store", rows, {"train": np.zeros((8, 2))}, {"train": np.zeros(8, np.int64)},
        tokenizer=AutoTokenizer.from_pretrained(tiny_tokenizer_dir), tokenizer_dir=tiny_tokenizer_dir,
        label_names=["negative", "positive"], identity={"teacher": {"name": str(tiny_teacher_dir)}},
    )  # fmt: skip


def config(**more) -> TrainConfig:
    return TrainConfig(stores=["store"], output_dir="out", **more)


def test_layers_are_counted_from_one(store, tiny_teacher_dir):
    student = build_student(config(student="from-teacher-layers:2"), store).model
    teacher = AutoModelForSequenceClassification.from_pretrained(tiny_teacher_dir)
    assert student.config.num_hidden_layers == 1
    kept = dict(student.named_parameters())
    for name, value in teacher.named_parameters():
        if ".layer.0." not in name:
            assert torch.equal(kept[name.replace(".layer.1.", ".layer.0.")], value), name
    assert student.config.id2label == {0: "negative", 1: "positive"}
    inputs = {"input_ids": torch.tensor([[2, 5, 9]])}
    assert student(**inputs).logits.shape == (1, 2)


def test_all_layers_are_the_teacher_itself(store, tiny_teacher_dir):
    student = build_student(config(student="from-teacher-layers:1,2"), store).model.eval()
    teacher = AutoModelForSequenceClassification.from_pretrained(tiny_teacher_dir).eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 9]])}
    assert torch.equal(student(**inputs).logits, teacher(**inputs).logits)


def test_other_architectures_and_sharded_weights(store, tmp_path):
    torch.manual_seed(0)
    small = {"vocab_size": 200, "dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 3}
    teacher = DistilBertForSequenceClassification(DistilBertConfig(**small)).eval()
    teacher.save_pretrained(tmp_path / "distilbert", max_shard_size="20KB")
    assert len(list((tmp_path / "distilbert").glob("*.safetensors"))) > 1
    student = build_student(
        config(student="from-teacher-layers:1,3", teacher=str(tmp_path / "distilbert")), store
    ).model
    left, right = student.distilbert.transformer.layer, teacher.distilbert.transformer.layer
    assert len(left) == 2
    assert torch.equal(left[1].ffn.lin1.weight, right[2].ffn.lin1.weight)
    albert = AlbertConfig(
        vocab_size=200,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    AlbertForSequenceClassification(albert).save_pretrained(tmp_path / "albert")
    with pytest.raises(ConfigError, match="not numbered by 3 blocks"):
        build_student(config(student="from-teacher-layers:1", teacher=str(tmp_path / "albert")), store)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1", "the first being 1"),
        ("", "numbers of the teacher's blocks"),
        ("one", "numbers"),
        ("3", "has 2 layers; got layer 3"),
    ],
)
def test_layers_that_are_not_there(store, text, message):
    with pytest.raises(ConfigError, match=message):
        build_student(config(student=f"from-teacher-layers:{text}"), store)


def test_a_teacher_that_is_not_there(store, tiny_teacher_dir, tmp_path):
    assert parse_layers("from-teacher-layers:1,3,5") == [1, 3, 5]
    with pytest.raises(ConfigError, match="neither a folder nor to be had from the Hub.*give --teacher FOLDER"):
        build_student(config(student="from-teacher-layers:1", teacher=str(tmp_path / "gone")), store)
    other = SimpleNamespace(path="store", identity={"teacher": {"name": str(tiny_teacher_dir), "weights_sha256": "0"}})
    with pytest.raises(ConfigError, match="does not hold the teacher of store"):
        teacher_folder(config(student="from-teacher-layers:1"), other)
    assert teacher_folder(config(student="from-teacher-layers:1", teacher=str(tmp_path)), other) == tmp_path
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \*.safetensors"):
        layer_state(tmp_path / "empty", [1], 2)


def test_legacy_names_and_missing_prefix_are_understood(store, tiny_teacher_dir, tmp_path):
    """Weights of a bare BertModel, without the prefix `bert.` and without a head."""
    state = load_file(tiny_teacher_dir / "model.safetensors")
    bare = {name.removeprefix("bert."): value for name, value in state.items() if name.startswith("bert.")}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_teacher_dir / "config.json").read_text())
    student = build_student(config(student="from-teacher-layers:2", teacher=str(tmp_path)), store).model
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(student.bert.encoder.layer[0].attention.self.query.weight, bare[query])


def test_a_config_gives_random_weights(store, tmp_path):
    settings = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    (tmp_path / "small.json").write_text(json.dumps(settings))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(settings))
    for path in (tmp_path / "small.json", tmp_path / "folder"):
        student = build_student(config(student_config=str(path)), store)
        assert student.model.config.vocab_size == len(student.tokenizer)
        assert student.model.config.num_labels == 2 and student.model.config.label2id["positive"] == 1
    (tmp_path / "bad.json").write_text("{}")
    for path, message in (("bad.json", "model_type"), ("gone.json", "config.json, or a folder")):
        with pytest.raises(ConfigError, match=message):
            build_student(config(student_config=str(tmp_path / path)), store)


def test_a_folder_without_a_head_gets_one(store, tmp_path, tiny_teacher_dir):
    settings = BertConfig.from_pretrained(tiny_teacher_dir)
    BertModel(settings).save_pretrained(tmp_path)
    student = build_student(config(student=str(tmp_path)), store)
    assert student.model.config.problem_type == "single_label_classification"
    assert not student.retokenize and student.tokenizer is not None, "a folder without a tokenizer takes the store's"


def test_a_head_of_other_labels_is_refused(store, tmp_path, tiny_teacher_dir):
    settings = BertConfig.from_pretrained(tiny_teacher_dir, num_labels=5)
    BertForSequenceClassification(settings).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="a head of 5 labels, the store's teacher has 2"):
        build_student(config(student=str(tmp_path)), store)


def test_no_such_student(store, tmp_path):
    with pytest.raises(ConfigError, match="a Hub id or a folder with config.json expected"):
        build_student(config(student=str(tmp_path / "gone")), store)
    with pytest.raises(ConfigError, match="one of --student and --student-config is expected; got both"):
        config(student="a", student_config="b")


def test_vocabulary_and_positions():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=32, **small))
    with pytest.raises(DataError, match="embeds 20 tokens, the tokenizer has 30"):
        check_vocabulary(model, range(30))
    check_vocabulary(model, range(20))
    check_positions(model, 32)
    with pytest.raises(DataError, match=r'at most 32 tokens, the longest row has 33.*--where "num_tokens <= 32"'):
        check_positions(model, 33)
    roberta = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=20, max_position_embeddings=34, pad_token_id=1, **small)
    )
    assert position_limit(roberta) == 32
    roberta.eval()(input_ids=torch.full((1, 32), 5))
    assert position_limit(torch.nn.Linear(2, 2)) is None
