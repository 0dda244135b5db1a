"""What dumps of a teacher's inside refuse, each in one line that says what to do; and what they never store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dump_cases import (
    own_cache,  # noqa: F401  a fixture
    rows,
    saved,
    settings,
    write,
)
from predistill.store import ConfigError, DataError, StoreMismatch
from predistill.store.activations import Sites
from predistill.teacher_dump.dump import dump, plan
from predistill.teacher_dump.inside import pilot as inner_pilot
from predistill.teacher_dump.inside import task as inner_task
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

INSIDE = ["logits", "hidden_states", "attentions"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "a.jsonl", rows(12))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"fields": ["hidden"]}, "--fields hidden: text-classification keeps logits, hidden_states, attentions, "),
        ({"fields": []}, "--fields : text-classification keeps logits, hidden_states"),
        ({"fields": ["logits"], "layers": "all"}, "--layers all: logits has no layers; leave it away"),
        ({"fields": INSIDE, "layers": "some"}, "--layers is all, last, uniform:4 or numbers such as 0,3,6; got 'some'"),
        ({"fields": INSIDE, "layers": "uniform:0"}, "--layers is all, last, uniform:4 or numbers"),
        ({"fields": INSIDE, "layers": "-1"}, "--layers is all, last, uniform:4 or numbers"),
        ({"fields": INSIDE, "layers": "0,3"}, r"--layers 0,3: the teacher has layers 0 \(embeddings\) to 2; got 3"),
        ({"fields": INSIDE, "layers": "uniform:3"}, "--layers uniform:3: the teacher has 2 blocks; give at most"),
        ({"fields": INSIDE, "layers": "0"}, "--layers 0 keeps nothing of attentions, which begin at layer 1; add one"),
        (
            {"fields": ["hidden_states"], "attention_storage": "head-mean"},
            "--attention-storage head-mean: nothing of attentions, attention_scores is kept",
        ),
        (
            {"fields": INSIDE, "attention_storage": "half"},
            "--attention-storage is one of exact, queries-keys, head-mean; got 'half'",
        ),
        ({"fields": INSIDE, "attention": "sdpa"}, "--attention sdpa does not tell its weights, and eager does"),
        ({"fields": INSIDE, "compile": True}, "--compile: a teacher whose inside is kept runs uncompiled"),
        (
            {"capture": ["bert.encoder.layer.7"]},
            r"--capture bert\.encoder\.layer\.7: the name of a module .* such as bert",
        ),
        ({"capture": ["bert.pooler", "bert_pooler"]}, "--capture bert_pooler: the name of a module"),
        ({"capture": ["bert.pooler"] * 2}, "--capture is a list of different names"),
        ({"budget": "1GB"}, "--budget is nothing that text-classification knows"),
        ({"fields": INSIDE, "budget": "1GB", "attention_storage": "head-mean"}, "--budget chooses --attention-storage"),
        ({"fields": INSIDE, "budget": "1GB", "dtype": "int8"}, "--budget chooses --dtype itself"),
        (
            {"fields": INSIDE, "budget": "3kB"},
            r"--budget 0.003 MB: the smallest store would have 0\.\d+ MB \(.*, int8\)",
        ),
    ],
)
def test_settings_that_cannot_be(
    tiny_teacher_dir: Path, data: Path, tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    defaults = {} if "budget" not in more else {"dtype": "float16"}
    with pytest.raises(ConfigError, match=words) as caught:
        dump(settings(tiny_teacher_dir, data, tmp_path / "s", **{**defaults, **more}))
    assert "\n" not in str(caught.value) and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": "1"}, r'settings\.layers differs: the store has "all", this run has "1"'),
        ({"fields": ["logits", "hidden_states"]}, r"settings\.\w+ differs"),
        ({"fields": ["logits"]}, r"settings\.\w+ differs"),
        ({"attention_storage": "queries-keys"}, r"settings\.attention_storage differs"),
        ({"capture": ["classifier"]}, r"settings\.capture differs"),
    ],
)
def test_other_settings_are_refused_by_name(
    tiny_teacher_dir: Path, data: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    dump(settings(tiny_teacher_dir, data, tmp_path / "s", fields=INSIDE))
    with pytest.raises(StoreMismatch, match=words):
        dump(settings(tiny_teacher_dir, data, tmp_path / "s", **{"fields": INSIDE, **change}))


def large(tokenizer_dir: Path, folder: Path, value: float) -> Path:
    """A teacher whose embedding of the token z has this value in it."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("z"), 3] = value
    return saved(model, tokenizer_dir, folder)


WORDS_OF_BERT = "bert.embeddings.word_embeddings"


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (70_000.0, "70000 at source row 150 is more than float16 holds .65504.: dump with --dtype bfloat16 or float32"),
        (-1e38, r"-?1e\+38 at source row 150 is more than float16 holds"),
    ],
)
def test_values_beyond_float16_stop_the_dump_at_their_row(
    tiny_tokenizer_dir: Path, tmp_path: Path, value: float, words: str, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 150 is none of the pilot's. copied: as from a GPU, where float16 is made before the copy."""
    if copied:
        monkeypatch.setattr(inner_task, "_NOT_COPIED", ())
    content = rows(200)
    content[150]["text"] = "a z film"
    data, teacher = write(tmp_path / "b.jsonl", content), large(tiny_tokenizer_dir, tmp_path / "t", value)
    more = {"fields": ["logits"], "capture": [WORDS_OF_BERT]}
    with pytest.raises(DataError, match=f"field teacher_module_bert_embeddings_word_embeddings: {words}.*, or int8"):
        dump(settings(teacher, data, tmp_path / "s", dtype="float16", **more))
    for kept in ("bfloat16", "int8"):
        assert dump(settings(teacher, data, tmp_path / "s", dtype=kept, overwrite=True, **more))["complete"]


def test_the_pilot_finds_what_float16_cannot_hold(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    teacher = large(tiny_tokenizer_dir, tmp_path / "t", 1e5)
    data = write(tmp_path / "b.jsonl", [{"text": "z z film", "label": 0}] * 9)
    more: dict[str, Any] = {"fields": ["logits"], "capture": [WORDS_OF_BERT]}
    with pytest.raises(DataError, match=r"100000 at source row \d is more than float16 holds"):
        plan(settings(teacher, data, tmp_path / "s", dtype="float16", **more))
    found = plan(settings(teacher, data, tmp_path / "s", dtype="float32", **more))["codecs"]
    held = {one["codec"]: one["relative_l2"] for one in found}
    assert held["float16"] is None and held["bfloat16"] < 1e-2 and held["int8"] < 1e-2
    chosen = dump(settings(teacher, data, tmp_path / "s", budget="1GB", dtype="float16", **more))["fields"]
    assert chosen["teacher_module_bert_embeddings_word_embeddings"]["codec"] == "int8"  # though float16 is affordable


def test_a_teacher_that_gives_nan_inside(tiny_teacher_dir: Path, data: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_teacher_dir)
    torch.nn.init.constant_(model.bert.encoder.layer[1].output.LayerNorm.bias, float("nan"))
    model.save_pretrained(tmp_path / "t")
    AutoTokenizer.from_pretrained(tiny_teacher_dir).save_pretrained(tmp_path / "t")
    with pytest.raises(DataError, match=r"field teacher_hidden_states_02: the teacher gave nan at source row \d+"):
        dump(settings(tmp_path / "t", data, tmp_path / "s", fields=["hidden_states"]))


def test_what_a_teacher_lacks(tiny_tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))
    size: dict[str, Any] = {"vocab_size": vocabulary, "max_position_embeddings": 64}
    small = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, **size)
    bare = saved(DistilBertForSequenceClassification(small), tiny_tokenizer_dir, tmp_path / "bare")
    with pytest.raises(ConfigError, match="pooled"):
        dump(settings(bare, data, tmp_path / "s", fields=["pooled"]))
    config = DebertaV2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **size)
    other = saved(DebertaV2ForSequenceClassification(config), tiny_tokenizer_dir, tmp_path / "other")
    for more in ({"fields": INSIDE, "attention_storage": "queries-keys"}, {"fields": ["queries"]}):
        with pytest.raises(ConfigError, match="exact"):
            dump(settings(other, data, tmp_path / "s", **more))
    exact = plan(settings(other, data, tmp_path / "s", fields=INSIDE))["codecs"]
    assert {one["codec"].split(",")[0] for one in exact if one["field"] == "attentions"} == {"exact", "head-mean"}
    affordable = dump(settings(other, data, tmp_path / "s", fields=INSIDE, budget="1GB", dtype="float16"))
    assert affordable["fields"]["teacher_attentions_00"]["shape"] == [2, "S", "S"]


def test_modules_that_have_no_column() -> None:
    with pytest.raises(ConfigError, match=r"one entry for each row of a batch, here of 2, expected; its shape is"):
        inner_pilot._row_shape(("module", "a.b"), [(8, (16, 4)), (4, (8, 4))])
    with pytest.raises(ConfigError, match="sizes fixed, or the number of tokens, expected"):
        inner_pilot._row_shape(("module", "a.b"), [(8, (2, 16)), (4, (2, 8))])
    assert inner_pilot._row_shape(("module", "a.b"), [(8, (2, 3, 8, 8)), (4, (2, 3, 4, 4))]) == (3, "S", "S")


def test_attentions_that_are_not_what_queries_and_keys_say(
    tiny_teacher_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pilot compares, whatever was found before."""
    run = inner_pilot.InnerPilot._run

    def other(self: Any, inputs: Any, places: Any, sites: Sites | None = None) -> Any:
        found = run(self, inputs, places, sites)
        return {place: value + (2e-5 if sites is self._sites else 0) for place, value in found.items()}

    monkeypatch.setattr(inner_pilot.InnerPilot, "_run", other)
    more = {"fields": ["attentions"], "attention_storage": "queries-keys"}
    with pytest.raises(ConfigError, match=r"teacher_attentions_00: .* within 1e-05 .* --attention-storage exact"):
        dump(settings(tiny_teacher_dir, data, tmp_path / "s", **more))


def test_a_plan_without_shards_holds_no_columns(
    tiny_teacher_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher of another depth after a dump that failed at its first shard."""
    from predistill.teacher_dump import dump as story

    with monkeypatch.context() as patched:
        patched.setattr(story, "_run_shards", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            dump(settings(tiny_teacher_dir, data, tmp_path / "s", fields=["hidden_states"]))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=200, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    other = saved(BertForSequenceClassification(config), tiny_teacher_dir, tmp_path / "t")
    found = dump(settings(other, data, tmp_path / "s", fields=["hidden_states"]))
    assert [name for name in found["fields"] if name.startswith("teacher_h")] == [
        "teacher_hidden_states_00", "teacher_hidden_states_01"
    ]  # fmt: skip
    assert np.all([field["shape"] == ["S", 8] for name, field in found["fields"].items() if "hidden" in name])
