"""What is inside the teacher, from the store, against the same teacher run in the test one row at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import language_cases
import numpy as np
import pytest
import torch
from dump_cases import (
    own_cache,  # noqa: F401  a fixture
    rows,
    saved,
    settings,
    shard_bytes,
    texts,
    write,
)
from predistill.store import TeacherStore
from predistill.store.verify import verify
from predistill.teacher_dump.capture import Capture
from predistill.teacher_dump.config import DumpConfig
from predistill.teacher_dump.dump import dump, plan
from predistill.teacher_dump.inside import task as inner_task
from predistill.teacher_dump.inside.layers import chosen_layers, columns_of
from predistill.teacher_dump.tasks import causal_lm
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

ROWS, LAYERS, HEADS = 24, 3, 2
KEPT = ["logits", "hidden_states", "attentions"]
SHAPE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 32,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = BertConfig(vocab_size=len(AutoTokenizer.from_pretrained(tiny_tokenizer_dir)), **SHAPE)
    return saved(BertForSequenceClassification(config), tiny_tokenizer_dir, tmp_path_factory.mktemp("inner"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "a.jsonl", rows(ROWS))


def live(teacher: Path, **more: Any) -> list[dict[str, np.ndarray]]:
    """Of each row alone, by eager attention: column -> [S, D], [H, S, S] or [D]."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForSequenceClassification.from_pretrained(teacher, attn_implementation="eager").eval()
    made = []
    for text in texts(ROWS):
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            out = model(**inputs, output_hidden_states=True, output_attentions=True, **more)
            pooled = getattr(model.base_model(**inputs), "pooler_output", None)
        states = {f"teacher_hidden_states_{n:02d}": state[0].numpy() for n, state in enumerate(out.hidden_states)}
        weights = {f"teacher_attentions_{n:02d}": one[0].numpy() for n, one in enumerate(out.attentions)}
        made.append({**states, **weights, **({} if pooled is None else {"teacher_pooled": pooled[0].numpy()})})
    return made


def same(folder: Path, expected: list[dict[str, np.ndarray]], columns: list[str], atol: float = 2e-6) -> None:
    with TeacherStore.open(folder) as store:
        stored = store.select()
        for at, row in enumerate(expected):
            found = stored[at]
            for name in columns:
                np.testing.assert_allclose(found[name], row[name], atol=atol, rtol=0, err_msg=f"{name} of row {at}")


def test_hidden_states_attentions_and_the_pooled_output(teacher: Path, data: Path, tmp_path: Path) -> None:
    found = dump(settings(teacher, data, tmp_path / "s", fields=["logits", "hidden_states", "attentions", "pooled"]))
    names = [name for name in found["fields"] if name.startswith(("teacher_h", "teacher_a", "teacher_pooled"))]
    assert names == [
        *(f"teacher_hidden_states_{n:02d}" for n in range(LAYERS + 1)),
        *(f"teacher_attentions_{n:02d}" for n in range(LAYERS)),
        "teacher_pooled",
    ]
    assert found["teacher"]["attention"] == "eager" and verify(tmp_path / "s")["ok"]
    same(tmp_path / "s", live(teacher), names)
    by_name = {one["name"]: one for one in json.loads((tmp_path / "s" / "plan.json").read_text())["fields"]}
    assert by_name["teacher_hidden_states_02"]["parameters"] == {"layers": LAYERS, "width": 16}
    said = by_name["teacher_attentions_01"]["parameters"]
    assert said["layers"] == LAYERS and said["attention"]["heads"] == HEADS and said["attention"]["scaling"] == 8**-0.5


def test_queries_and_keys_make_attentions_and_scores(teacher: Path, data: Path, tmp_path: Path) -> None:
    both = ["attentions", "attention_scores"]
    found = dump(settings(teacher, data, tmp_path / "s", fields=both, attention_storage="queries-keys"))
    columns = [name for name in found["fields"] if name.startswith(("teacher_q", "teacher_k", "teacher_a"))]
    assert columns == [f"teacher_{kind}_{n:02d}" for kind in ("queries", "keys") for n in range(LAYERS)]
    assert found["teacher"]["attention"] == "sdpa" and "teacher_logits" not in found["fields"]
    dump(settings(teacher, data, tmp_path / "exact", fields=["attention_scores", "values"]))
    exact = live(teacher)
    with TeacherStore.open(tmp_path / "s") as store, TeacherStore.open(tmp_path / "exact") as other:
        for at in range(ROWS):
            row, scores = store.select()[at], other.select()[at]
            for n in range(LAYERS):
                q, k = row[f"teacher_queries_{n:02d}"], row[f"teacher_keys_{n:02d}"]
                made = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(8)
                np.testing.assert_allclose(made, scores[f"teacher_attention_scores_{n:02d}"], atol=1e-5)
                probabilities = torch.from_numpy(made).softmax(-1)
                np.testing.assert_allclose(probabilities, exact[at][f"teacher_attentions_{n:02d}"], atol=1e-5)
            assert scores["teacher_values_00"].shape == (len(row["input_ids"]), HEADS, 8)


def test_the_mean_over_heads(teacher: Path, data: Path, tmp_path: Path) -> None:
    config = settings(teacher, data, tmp_path / "s", fields=["attentions"], attention_storage="head-mean", layers="2")
    found = dump(config)
    assert found["fields"]["teacher_attentions_01"]["shape"] == [1, "S", "S"]
    expected = [
        {name: row[name].mean(0, keepdims=True) for name in ("teacher_attentions_01",)} for row in live(teacher)
    ]
    same(tmp_path / "s", expected, ["teacher_attentions_01"])
    fields = json.loads((tmp_path / "s" / "plan.json").read_text())["fields"]
    [said] = [one["parameters"] for one in fields if one["name"] == "teacher_attentions_01"]
    assert said["heads"] == HEADS and said["mean_over_heads"] is True


def test_int8_keeps_logits_and_is_near(teacher: Path, data: Path, tmp_path: Path) -> None:
    found = dump(settings(teacher, data, tmp_path / "s", fields=KEPT, dtype="int8"))
    assert found["fields"]["teacher_logits"]["dtype"] == "float16"
    assert found["fields"]["teacher_attentions_00"]["codec"] == "int8"
    with TeacherStore.open(tmp_path / "s") as store:
        for at, row in enumerate(live(teacher)):
            for name, exact in row.items():
                if name != "teacher_pooled":
                    bound = np.abs(exact).max(axis=-1, keepdims=True) / 254 + 1e-5  # half a level of each block
                    assert (np.abs(store.select()[at][name] - exact) <= bound).all(), name


def test_layers_are_counted_one_way() -> None:
    assert chosen_layers("all", 3) == (0, 1, 2, 3) and chosen_layers("last", 12) == (12,)
    assert chosen_layers("6, 0,3,3", 12) == (0, 3, 6)
    assert chosen_layers("uniform:4", 12) == (0, 3, 6, 9, 12)
    assert chosen_layers("uniform:4", 6) == (0, 2, 3, 5, 6)  # 1.5 and 4.5 round up
    assert columns_of("hidden_states", (0, 3)) == (0, 3) and columns_of("queries", (0, 3)) == (2,)


def test_only_the_layers_asked_for(teacher: Path, data: Path, tmp_path: Path) -> None:
    found = dump(settings(teacher, data, tmp_path / "s", fields=KEPT, layers="0,3"))
    names = [name for name in found["fields"] if name.startswith(("teacher_h", "teacher_a"))]
    assert names == ["teacher_hidden_states_00", "teacher_hidden_states_03", "teacher_attentions_02"]
    same(tmp_path / "s", live(teacher), names)


@pytest.mark.parametrize("family", ["albert", "deberta"])
def test_other_architectures(family: str, tiny_tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    """ALBERT runs one block three times; DeBERTa's attention does not come through transformers' interface."""
    torch.manual_seed(0)
    size = {"vocab_size": len(AutoTokenizer.from_pretrained(tiny_tokenizer_dir)), **SHAPE}
    model = (
        AlbertForSequenceClassification(AlbertConfig(embedding_size=8, **size))
        if family == "albert"
        else DebertaV2ForSequenceClassification(DebertaV2Config(relative_attention=True, **size))
    )
    teacher = saved(model, tiny_tokenizer_dir, tmp_path / "t")
    dump(settings(teacher, data, tmp_path / "s", fields=KEPT))
    names = [f"teacher_{kind}_{n:02d}" for kind in ("hidden_states", "attentions") for n in range(LAYERS)]
    same(tmp_path / "s", live(teacher), [*names, f"teacher_hidden_states_{LAYERS:02d}"])


# ---- language models ----


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = language_cases.llama(num_key_value_heads=1, num_hidden_layers=LAYERS)
    return language_cases.saved(tmp_path_factory.mktemp("decoder"), model, language_cases.byte_level())


def decoded(decoder: Path, row: dict[str, np.ndarray]) -> Any:
    """The live decoder on a stored row, packed or not; a mask made here keeps the documents apart."""
    model = AutoModelForCausalLM.from_pretrained(decoder, attn_implementation="eager").eval()
    ids = torch.from_numpy(row["input_ids"]).long()[None]
    places = torch.from_numpy(row["position_ids"]).long() if "position_ids" in row else torch.arange(ids.shape[1])
    document = (places == 0).cumsum(0)
    seen = (document[:, None] == document) & torch.ones(len(places), len(places)).tril().bool()
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        return model(
            input_ids=ids,
            position_ids=places[None],
            attention_mask=mask,
            output_hidden_states=True,
            output_attentions=True,
        )


@pytest.mark.parametrize("more", [{}, {"packing": True, "max_length": 24}, {"split head": False}])
@pytest.mark.parametrize("storage", ["exact", "queries-keys"])
def test_decoders(
    decoder: Path, tmp_path: Path, more: dict[str, Any], storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "split head" in more:  # a batch then runs in pieces
        more = {}
        monkeypatch.setattr(causal_lm, "split_head", lambda *_: None)
    data = write(tmp_path / "a.jsonl", [{"text": line} for line in language_cases.LINES * 2])
    config = language_cases.settings(
        decoder, data, tmp_path / "s", fields=["logits", "hidden_states", "attentions"], attention_storage=storage,
        top_k_logits=8, **more,
    )  # fmt: skip
    dump(config)
    with TeacherStore.open(tmp_path / "s") as store:
        stored = store.select()
        for at in range(len(stored)):
            row = stored[at]
            exact = decoded(decoder, row)
            for n, state in enumerate(exact.hidden_states):
                np.testing.assert_allclose(row[f"teacher_hidden_states_{n:02d}"], state[0], atol=1e-4)  # up to 20
            for n, weights in enumerate(exact.attentions):
                if storage == "exact":
                    np.testing.assert_allclose(row[f"teacher_attentions_{n:02d}"], weights[0], atol=1e-5)
                else:  # one key head for two heads of queries
                    q, k = row[f"teacher_queries_{n:02d}"], row[f"teacher_keys_{n:02d}"]
                    scores = torch.from_numpy(np.einsum("qhd,kd->hqk", q, k[:, 0]) / math.sqrt(8))
                    made = scores.masked_fill(weights[0] == 0, -math.inf).softmax(-1)
                    np.testing.assert_allclose(made, weights[0], atol=1e-5)


def test_completions_keep_the_inside_of_every_token(decoder: Path, tmp_path: Path) -> None:
    content = [{"prompt": line[:20], "completion": line[20:]} for line in language_cases.LINES]
    data = write(tmp_path / "a.jsonl", content)
    config = {"fields": ["logits", "hidden_states"], "positions": "completion", "layers": "last", "top_k_logits": 8}
    found = dump(language_cases.settings(decoder, data, tmp_path / "s", **config))
    assert found["fields"]["teacher_top_k_logits"]["shape"][0] == "P"
    assert found["fields"][f"teacher_hidden_states_{LAYERS:02d}"]["shape"] == ["S", 16]
    with TeacherStore.open(tmp_path / "s") as store:
        row = store.select()[2]
        state = decoded(decoder, row).hidden_states[LAYERS][0]
        np.testing.assert_allclose(row[f"teacher_hidden_states_{LAYERS:02d}"], state, atol=1e-4)


# ---- modules ----


class PicturesConfig(PretrainedConfig):
    model_type = "predistill-pictures"


class Pictures(PreTrainedModel):
    """A text as a picture of 4 x 6, a convolution over it: no transformer, and no hidden states to ask for."""

    config_class = PicturesConfig

    def __init__(self, config: PicturesConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, 6)
        self.layer3 = nn.Conv2d(1, 5, 3, padding=1)
        self.classifier = nn.Linear(5, 2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        words = self.embeddings(input_ids) * attention_mask[:, :, None]
        picture = words[:, :2].repeat(1, 2, 1)[:, None]
        return SequenceClassifierOutput(logits=self.classifier(self.layer3(picture).mean((2, 3))))


def test_modules_of_any_model(tiny_tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    AutoConfig.register("predistill-pictures", PicturesConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(PicturesConfig, Pictures, exist_ok=True)
    torch.manual_seed(0)
    model = Pictures(PicturesConfig(vocab_size=len(AutoTokenizer.from_pretrained(tiny_tokenizer_dir)), num_labels=2))
    teacher = saved(model, tiny_tokenizer_dir, tmp_path / "t")
    found = dump(settings(teacher, data, tmp_path / "s", capture=["embeddings", "layer3"], fields=["logits"]))
    assert found["fields"]["teacher_module_embeddings"]["shape"] == ["S", 6]
    assert found["fields"]["teacher_module_layer3"]["shape"] == [5, 4, 6]
    with TeacherStore.open(tmp_path / "s") as store, torch.no_grad():
        for at in range(ROWS):
            row = store.select()[at]
            words = model.embeddings(torch.from_numpy(row["input_ids"]).long())
            np.testing.assert_allclose(row["teacher_module_embeddings"], words, atol=1e-6)
            expected = model.layer3(words[:2].repeat(2, 1)[None, None])[0]
            np.testing.assert_allclose(row["teacher_module_layer3"], expected, atol=1e-6)


# ---- plans, budgets, going on ----


def test_a_plan_measures_every_way(teacher: Path, data: Path, tmp_path: Path) -> None:
    found = plan(settings(teacher, data, tmp_path / "s", fields=KEPT, layers="3"))
    table = {(one["field"], one["codec"]): one for one in found["codecs"]}
    assert sum(one["chosen"] for one in found["codecs"]) == 0  # float32, which loses nothing
    assert json.loads(json.dumps(found["codecs"])) == found["codecs"] and not (tmp_path / "s").exists()
    states = [table["hidden_states", kind] for kind in ("float16", "bfloat16", "int8")]
    assert [one["bytes_per_token"] // 1 for one in states[:2]] == [32, 32]  # 16 wide, and starts
    exact = torch.from_numpy(np.concatenate([row["teacher_hidden_states_03"] for row in live(teacher)]))
    for one, kind in zip(states[:2], (torch.float16, torch.bfloat16), strict=True):
        error = float((exact.to(kind).float() - exact).norm() / exact.norm())
        assert one["relative_l2"] == pytest.approx(error, rel=0.1) and one["cosine"] > 0.9999  # of some of the rows
    assert states[1]["relative_l2"] < states[2]["relative_l2"] < 0.02
    assert 0 < table["attentions", "queries-keys, float16"]["relative_l2"] < 2e-3
    assert table["attentions", "head-mean, float16"]["relative_l2"] > 0.01
    real = dump(settings(teacher, data, tmp_path / "s", fields=KEPT, layers="3"))
    assert abs(found["bytes"] / real["bytes"] - 1) < 0.1


def test_long_rows_weigh_more_in_attentions(teacher: Path, tmp_path: Path) -> None:
    """bytes of [H, S, S] follow the mean of S squared, which is more than the square of the mean."""
    words = [" ".join(["film"] * (60 if at % 4 == 0 else 1)) for at in range(40)]
    data = write(tmp_path / "a.jsonl", [{"text": text, "label": 0} for text in words])
    config = settings(teacher, data, tmp_path / "s", fields=["attentions"])
    assert abs(plan(config)["bytes"] / dump(config)["bytes"] - 1) < 0.1


def test_a_budget_chooses_for_classification(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(name: str, **more: Any) -> DumpConfig:
        more = {"dtype": "float16", "fields": ["logits", "hidden_states", "attentions"], **more}
        return settings(teacher, data, tmp_path / name, **more)

    sizes = {dtype: dump(config(dtype, dtype=dtype))["bytes"] for dtype in ("float16", "int8")}
    index = 150 * ROWS  # what the plan counts for a row of the index
    found = dump(config("whole", budget=sizes["float16"] + index))
    assert found["fields"]["teacher_attentions_00"]["dtype"] == "float16" and found["teacher"]["attention"] == "eager"
    small = dump(config("small", budget=sizes["int8"] + index))
    assert small["fields"]["teacher_hidden_states_00"]["codec"] == "int8" and small["bytes"] <= sizes["int8"] + index
    assert "note: the budget allows hidden_states as int8, " in capsys.readouterr().err
    same(tmp_path / "whole", live(teacher), ["teacher_attentions_02"], atol=1e-3)
    monkeypatch.setattr(Capture, "__init__", lambda *_: pytest.fail("the teacher was loaded"))
    assert dump(config("small", budget=sizes["int8"] + index))["complete"]


def test_a_budget_is_shared_with_logits_of_language_models(decoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"text": line} for line in language_cases.LINES * 8])
    more = {"fields": ["logits", "hidden_states"], "dtype": "float16"}
    whole = dump(language_cases.settings(decoder, data, tmp_path / "a", **more))["bytes"]
    found = dump(language_cases.settings(decoder, data, tmp_path / "s", budget=whole, **more))
    said = json.loads((tmp_path / "s" / "plan.json").read_text())["settings"]
    assert found["bytes"] <= whole and said["inner_dtype"] in ("float16", "int8") and said["top_k_logits"] is not None
    assert dump(language_cases.settings(decoder, data, tmp_path / "s", budget=whole, **more))["complete"]


def test_a_dump_goes_on_and_a_done_one_needs_no_teacher(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {
        "fields": ["logits", "hidden_states", "attentions"], "attention_storage": "queries-keys", "shard_size": 20_000,
    }  # fmt: skip
    dump(settings(teacher, data, tmp_path / "s", **more))
    before = shard_bytes(tmp_path / "s")
    assert len(before) > 2
    shard = sorted((tmp_path / "s" / "shards").glob("*.arrow"))[1]
    for path in (shard, shard.with_suffix(".json"), tmp_path / "s" / "store.json"):
        path.unlink()
    assert dump(settings(teacher, data, tmp_path / "s", **more))["complete"]
    assert shard_bytes(tmp_path / "s") == before and verify(tmp_path / "s")["ok"]
    monkeypatch.setattr(Capture, "__init__", lambda *_: pytest.fail("the teacher was loaded"))
    assert dump(settings(teacher, data, tmp_path / "s", **more))["complete"]


def test_columns_rounded_on_the_device_are_the_same_bytes(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"fields": [*KEPT, "queries", "pooled"], "dtype": "float16"}
    dump(settings(teacher, data, tmp_path / "host", **more))
    monkeypatch.setattr(inner_task, "_NOT_COPIED", ())  # as from a GPU
    dump(settings(teacher, data, tmp_path / "device", **more))
    assert shard_bytes(tmp_path / "host") == shard_bytes(tmp_path / "device")


def test_the_same_inside_whatever_the_batches(teacher: Path, data: Path, tmp_path: Path) -> None:
    for tokens in (1, 10**6):
        more = {"fields": ["hidden_states", "attentions"], "tokens_per_batch": tokens}
        dump(settings(teacher, data, tmp_path / str(tokens), **more))
        same(tmp_path / str(tokens), live(teacher), ["teacher_hidden_states_03", "teacher_attentions_02"])
