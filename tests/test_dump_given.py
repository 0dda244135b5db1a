"""A teacher given as an object: what its modules give is stored as a hook of the test's own sees it, and the object is
afterwards what it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dump_cases import (
    own_cache,  # noqa: F401  a fixture
    rows,
    settings,
    shard_bytes,
    texts,
    write,
)
from predistill.store import ConfigError, StoreMismatch, TeacherStore
from predistill.store.identity import state_sha256
from predistill.store.verify import verify
from predistill.teacher_dump import dump as story
from predistill.teacher_dump.dump import dump, plan
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROWS, CLASSES, SIDE, CHANNELS = 40, 3, 8, 4
VOCABULARY = 256


class Pictures(nn.Module):
    """A text as a picture: its token embeddings, eight wide, in eight bins of tokens; then convolutions over it."""

    def __init__(self, give: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, SIDE)
        self.layer1 = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, padding=1), nn.ReLU(inplace=True))
        self.layer2 = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)
        self.dropout, self.head, self.give = nn.Dropout(0.5), nn.Linear(CHANNELS, CLASSES), give

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        found = self.embeddings(input_ids) * attention_mask[..., None]
        bins = nn.functional.one_hot(input_ids % SIDE, SIDE).float()
        maps = self.layer1((bins.transpose(1, 2) @ found)[:, None])
        return self.give(self.head(self.dropout(self.layer2(maps).mean(dim=(2, 3)))))


class Reader(nn.Module):
    """A BiLSTM with the mean of its states."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, 6)
        self.lstm = nn.LSTM(6, 5, bidirectional=True, batch_first=True)
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> SimpleNamespace:
        lengths = attention_mask.sum(dim=1).cpu()
        found = self.embeddings(input_ids) + token_type_ids[..., None]
        packed = nn.utils.rnn.pack_padded_sequence(found, lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        states = self.norm(states)
        return SimpleNamespace(logits=self.head(states.sum(dim=1) / lengths[:, None]))


class Twice(Pictures):
    """What has a name, and nothing to keep under it."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.never = nn.Linear(CLASSES, CLASSES), nn.Linear(1, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.again(self.again(super().forward(input_ids, attention_mask)))


class Namesakes(Pictures):
    def __init__(self) -> None:
        super().__init__()
        self.layer1_0 = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.layer1_0(super().forward(input_ids, attention_mask))


def seeded(kind: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return kind()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = rows(ROWS, label=lambda at: at % 2)
    return write(tmp_path_factory.mktemp("data") / "a.jsonl", content)


def hooked(model: nn.Module, tokenizer_dir: Path, names: list[str]) -> list[dict[str, np.ndarray]]:
    """Of each row alone: the logits, and what these modules give, taken at once."""
    tokenizer, seen, made = AutoTokenizer.from_pretrained(tokenizer_dir), {}, []
    taken = "token_type_ids" in model.forward.__code__.co_varnames
    model.eval()

    def keep(name: str) -> Callable[..., None]:
        return lambda module, given, output: seen.__setitem__(name, output[0].detach().clone().numpy())

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        for text in texts(ROWS):
            inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
            outputs = model(**{name: value for name, value in inputs.items() if taken or name != "token_type_ids"})
            made.append({**seen, "logits": getattr(outputs, "logits", outputs)[0].numpy()})
    for hook in hooks:
        hook.remove()
    return made


def test_feature_maps(tiny_tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    """As layer1.0 gives them, before the ReLU after it changes them in place."""
    model, names = seeded(Pictures).train(), ["layer1.0", "layer2", "embeddings", "head"]
    model.head.eval()
    model.layer2.weight.requires_grad_(False)
    found = dump(settings(tiny_tokenizer_dir, data, tmp_path / "s", capture=names), model=model)
    shapes = [found["fields"]["teacher_module_" + name.replace(".", "_")]["shape"] for name in names]
    assert shapes == [[CHANNELS, SIDE, SIDE], [CHANNELS, SIDE // 2, SIDE // 2], ["S", SIDE], [CLASSES]]
    assert model.training and model.dropout.training and not model.head.training and not model.layer2.weight.grad
    assert [one.requires_grad for one in model.layer2.parameters()] == [False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with TeacherStore.open(tmp_path / "s") as store:
        stored = store.select()
        for at, row in enumerate(hooked(model, tiny_tokenizer_dir, names)):
            for name in names:
                column = stored[at]["teacher_module_" + name.replace(".", "_")]
                np.testing.assert_allclose(column, row[name], atol=1e-6, rtol=0)
            np.testing.assert_allclose(stored[at]["teacher_logits"], row["logits"], atol=1e-6, rtol=0)
        fields = {spec["name"]: spec for spec in json.loads((tmp_path / "s" / "plan.json").read_text())["fields"]}
    assert fields["teacher_module_layer1_0"]["parameters"] == {"module": "layer1.0"}
    assert stored[0]["teacher_module_layer1_0"].min() < 0 and verify(tmp_path / "s")["ok"]
    model.train()(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4)).sum().backward()  # it trains on


def test_a_reader_of_packed_sequences(tiny_tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    model = seeded(Reader)
    more: dict[str, Any] = {"capture": ["norm"], "tokens_per_batch": 100}
    sizes = plan(settings(tiny_tokenizer_dir, data, tmp_path / "s", **{**more, "dtype": "int8"}), model=model)
    assert {one["field"] for one in sizes["codecs"]} == {"norm"} and not (tmp_path / "s").exists()
    assert [one["codec"] for one in sizes["codecs"] if one["chosen"]] == ["int8"]
    found = dump(settings(tiny_tokenizer_dir, data, tmp_path / "s", **more), model=model)
    assert found["fields"]["teacher_module_norm"]["shape"] == ["S", 10]
    assert found["fields"]["token_type_ids"]["role"] == "input"
    with TeacherStore.open(tmp_path / "s") as store:
        stored = store.select()
        for at, row in enumerate(hooked(model, tiny_tokenizer_dir, ["norm"])):
            np.testing.assert_allclose(stored[at]["teacher_module_norm"], row["norm"], atol=1e-6, rtol=0)
            np.testing.assert_allclose(stored[at]["teacher_logits"], row["logits"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "give",
    [lambda logits: {"logits": logits}, lambda logits: (logits, "more"), lambda logits: SimpleNamespace(logits=logits)],
)
def test_logits_in_any_wrapping(
    tiny_tokenizer_dir: Path, data: Path, tmp_path: Path, give: Callable[[Tensor], Any]
) -> None:
    for name, model in (("s", seeded(Pictures)), ("t", seeded(lambda: Pictures(give)))):
        dump(settings(tiny_tokenizer_dir, data, tmp_path / name), model=model)
    assert shard_bytes(tmp_path / "s") == shard_bytes(tmp_path / "t")


def test_a_stopped_dump_goes_on(
    tiny_tokenizer_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"capture": ["layer2"], "shard_size": 4000}
    dump(settings(tiny_tokenizer_dir, data, tmp_path / "whole", **more), model=seeded(Pictures))
    run, done = story._run_shard, []

    def stops(*given: Any) -> None:
        done.append(given)
        if len(done) > 2:
            raise KeyboardInterrupt
        run(*given)

    with monkeypatch.context() as patched:
        patched.setattr(story, "_run_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            dump(settings(tiny_tokenizer_dir, data, tmp_path / "s", **more), model=seeded(Pictures))
    assert 0 < len(shard_bytes(tmp_path / "s")) < len(shard_bytes(tmp_path / "whole"))
    other = seeded(Pictures, 1)
    with pytest.raises(StoreMismatch, match=r"identity\.teacher\.state_sha256 differs: the store has \w{12}, this run"):
        dump(settings(tiny_tokenizer_dir, data, tmp_path / "s", **more), model=other)
    dump(settings(tiny_tokenizer_dir, data, tmp_path / "s", **more), model=seeded(Pictures))
    assert shard_bytes(tmp_path / "s") == shard_bytes(tmp_path / "whole")
    with pytest.raises(StoreMismatch, match=r"identity\.teacher\.class differs"):
        dump(settings(tiny_tokenizer_dir, data, tmp_path / "s", **more), model=seeded(Namesakes))


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        (Pictures, {"capture": ["layer3"]}, "--capture layer3: the name of a module of Pictures expected, such as "),
        (Twice, {"capture": ["again"]}, "--capture again: a module that Twice runs once a forward pass, .*, such as "),
        (Twice, {"capture": ["never"]}, "--capture never: a module that Twice runs once a forward pass"),
        (Namesakes, {"capture": ["layer1.0", "layer1_0"]}, "two of them would be the column teacher_module_layer1_0;"),
        (Pictures, {"fields": ["hidden_states"]}, "hidden_states: Pictures is no transformers model, .* --capture"),
        (Pictures, {"fields": ["attentions"]}, "--fields attentions: Pictures is no transformers model"),
        (Pictures, {"fields": ["pooled"]}, "--fields pooled: Pictures gives none; leave it away, or name modules"),
        (lambda: Pictures(lambda logits: "none"), {}, r"Pictures .*: a forward that gives logits expected .* str"),
        (lambda: Pictures(lambda logits: {"scores": logits}), {}, "a forward that gives logits expected .* gives dict"),
        (lambda: Pictures(lambda logits: ()), {}, "a forward that gives logits expected"),
        (lambda: Pictures(lambda logits: logits[:, :, None]), {}, r"logits \[B, C\] expected, .* \[2, 3, 1\]"),
        (lambda: Pictures(lambda logits: logits[0]), {}, r"logits \[B, C\] expected, .* \[3\]: give a model"),
        (lambda: nn.Linear(1, 2), {}, "input_ids and attention_mask by name expected; Linear.forward takes input:"),
        (lambda: nn.Embedding, {}, "model: a torch.nn.Module expected; got type"),
        (Pictures, {"teacher_dtype": "float16"}, "--teacher-dtype: a model that is given runs as it is"),
        (Pictures, {"compile": True}, "--compile: a model that is given runs as it is"),
        (Pictures, {"task": "causal-lm"}, r"logits \[B, S, C\] expected, .* have shape \[2, 3\]"),
        (Pictures, {"label_names": ["a", "b"]}, "--label-names: the teacher has 3 classes; got 2 names"),
    ],
)
def test_what_cannot_be(
    tiny_tokenizer_dir: Path, data: Path, tmp_path: Path, kind: Callable[[], Any], more: dict[str, Any], words: str
) -> None:
    model = kind()
    with pytest.raises(ConfigError, match=words) as caught:
        dump(settings(tiny_tokenizer_dir, data, tmp_path / "s", **more), model=model)
    assert "\n" not in str(caught.value) and not (tmp_path / "s").exists()
    assert not isinstance(model, nn.Module) or (model.training and not model._forward_hooks)


def test_a_module_that_fails_says_what_it_was_given(tiny_tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    model = seeded(Pictures)
    model.embeddings = nn.Embedding(3, SIDE)
    with pytest.raises(ConfigError, match=r"^Pictures with input_ids, attention_mask \[2, \d+\]: index out of range"):
        dump(settings(tiny_tokenizer_dir, data, tmp_path / "s"), model=model)
    assert not (tmp_path / "s").exists()


def test_a_model_of_transformers_as_an_object(tiny_teacher_dir: Path, data: Path, tmp_path: Path) -> None:
    """The same store, but for who the teacher is, as of the folder it was loaded from."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_teacher_dir).train()
    before = (model.config.to_dict(), model.config._attn_implementation)
    more: dict[str, Any] = {"fields": ["logits", "hidden_states", "attentions", "pooled"]}
    given = dump(settings(tiny_teacher_dir, data, tmp_path / "s", **more), model=model)
    named = dump(settings(tiny_teacher_dir, data, tmp_path / "t", **more))
    assert model.training and (model.config.to_dict(), model.config._attn_implementation) == before
    assert given["label_names"] == named["label_names"] == ["negative", "positive"]
    assert given["fields"].keys() == named["fields"].keys()
    who = given["teacher"]
    assert "name" not in who and (who["class"], who["attention"]) == ("BertForSequenceClassification", "eager")
    told = re.search(r"\| teacher \| (.*) \|", (tmp_path / "s" / "README.md").read_text())
    assert told and told[1].startswith("BertForSequenceClassification, ")
    assert told[1].endswith(f"state_sha256 {who['state_sha256'][:12]}")
    with TeacherStore.open(tmp_path / "s") as store, TeacherStore.open(tmp_path / "t") as other:
        for at in range(ROWS):
            mine, theirs = store.select()[at], other.select()[at]
            assert all(np.array_equal(mine[name], theirs[name]) for name in named["fields"] if name != "sample_id")
    again = AutoModelForSequenceClassification.from_pretrained(tiny_teacher_dir)
    assert dump(settings(tiny_teacher_dir, data, tmp_path / "s", **more), model=again)["complete"]
    again.config.num_attention_heads = 1
    with pytest.raises(StoreMismatch, match=r"identity\.teacher\.config_sha256 differs"):
        dump(settings(tiny_teacher_dir, data, tmp_path / "s", **more), model=again)


def test_classes_of_a_config_beside_the_tokenizer(tiny_teacher_dir: Path, data: Path, tmp_path: Path) -> None:
    """Taken where it has as many as the model gives."""
    found = dump(settings(tiny_teacher_dir, data, tmp_path / "s"), model=seeded(Reader))
    assert found["label_names"] == ["negative", "positive"]
    assert dump(settings(tiny_teacher_dir, data, tmp_path / "t"), model=seeded(Pictures))["label_names"] is None


class Next(nn.Module):
    """A causal language model with nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.gru = nn.Embedding(VOCABULARY, 8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.head(self.gru(self.embeddings(input_ids))[0]),)


def test_language_models(tiny_tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    model = seeded(Next)
    more: dict[str, Any] = {"task": "causal-lm", "top_k_logits": 0, "capture": ["gru"]}
    dump(settings(tiny_tokenizer_dir, data, tmp_path / "s", **more), model=model)
    with TeacherStore.open(tmp_path / "s") as store:
        row = store.select()[3]
    ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)[None]
    with torch.no_grad():
        states, (logits,) = model.gru(model.embeddings(ids))[0][0], model(ids, torch.ones_like(ids))
    np.testing.assert_allclose(row["teacher_module_gru"], states.numpy(), atol=1e-6, rtol=0)
    np.testing.assert_allclose(row["teacher_logits"], logits[0].numpy(), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="--packing: a teacher that takes position ids"):
        dump(settings(tiny_tokenizer_dir, data, tmp_path / "t", packing=True, **more), model=model)


def test_a_packed_language_model_keeps_its_cache(tiny_tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    model = LlamaForCausalLM(config).train()
    more: dict[str, Any] = {"task": "causal-lm", "packing": True, "max_length": 32, "fields": ["hidden_states"]}
    with pytest.raises(ConfigError, match="--capture lm_head: it gives the logits, which --top-k-logits 0 keeps"):
        dump(settings(tiny_tokenizer_dir, data, tmp_path / "s", capture=["lm_head"], **more), model=model)
    assert dump(settings(tiny_tokenizer_dir, data, tmp_path / "s", **more), model=model)["complete"]
    assert model.config.use_cache and model.config.pad_token_id is None and model.training


def test_the_hash_is_of_names_dtypes_shapes_and_bytes() -> None:
    state: dict[str, Any] = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(1, dtype=torch.bfloat16),
        "c": {"more": 1},
    }
    own = state_sha256(state)
    assert re.fullmatch("[0-9a-f]{64}", own) and own == state_sha256(dict(reversed(state.items())))
    assert own == state_sha256({**state, "a": torch.arange(6.0).reshape(3, 2).T.reshape(2, 3) * 0 + state["a"]})
    others = [
        {**state, "a": state["a"].reshape(3, 2)}, {**state, "a": state["a"].int()}, {**state, "a": state["a"] + 1e-6},
        {**{name: state[name] for name in "ac"}, "d": state["b"]}, {**state, "c": {"more": 2}},
    ]  # fmt: skip
    assert len({own, *map(state_sha256, others)}) == 6
