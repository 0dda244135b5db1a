"""A plan compares ways of keeping logits, a budget chooses, and whoever continues a dump keeps to what was chosen."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dump_cases import own_cache, rows, saved, write  # noqa: F401  a fixture
from predistill.store import ConfigError, StoreMismatch, TeacherStore
from predistill.store.schema import TOP_K_COUNTS, TOP_K_LOGITS
from predistill.teacher_dump import budget
from predistill.teacher_dump.capture import Capture
from predistill.teacher_dump.config import DumpConfig
from predistill.teacher_dump.dump import dump, plan
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

VOCABULARY = 700  # padded: the tokenizer has fewer


@pytest.fixture(scope="module")
def teacher(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
        initializer_range=0.5,
    )  # fmt: skip
    return saved(LlamaForCausalLM(config), tiny_tokenizer_dir, tmp_path_factory.mktemp("language"))


def settings(teacher: Path, folder: Path, count: int = 300, **more: Any) -> DumpConfig:
    data = folder.parent / f"rows-{count}.jsonl"
    if not data.exists():
        write(data, [{"text": row["text"]} for row in rows(count)])
    given = {"teacher": str(teacher), "dataset": str(data), "task": "causal-lm", "output_dir": str(folder), **more}
    return DumpConfig(**{"device": "cpu", "tokens_per_batch": 512, **given})


def test_a_plan_compares(teacher: Path, tmp_path: Path) -> None:
    found = plan(settings(teacher, tmp_path / "s", top_k_logits=20))
    assert not (tmp_path / "s").exists() and found["chosen"] == "top 20, float16"
    table = {one["name"]: one for one in found["candidates"]}
    assert {"top 8, float16", "top 8, int8", "top 256 up to p = 0.95, float16", "50 draws", "all, float16"} <= {*table}
    assert json.loads(json.dumps(found["candidates"])) == found["candidates"]
    real = dump(settings(teacher, tmp_path / "s", top_k_logits=20))
    assert abs(found["bytes"] / real["bytes"] - 1) < 0.03
    assert table["top 20, float16"]["bytes_per_token"] == 20 * 2 + 25 + 4 + 4
    assert abs(table["top 20, float16"]["bytes"] / real["bytes"] - 1) < 0.15  # the index counts too
    assert dump(settings(teacher, tmp_path / "s", top_k_logits=20, dry_run=True))["chosen"] == "top 20, float16"


@pytest.mark.parametrize("more", [{"packing": True, "max_length": 40}, {"top_p": 0.5}, {"sampled_logits": 8}, {}])
def test_sizes_are_foreseen(teacher: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    ways = {} if "sampled_logits" in more else {"top_k_logits": 100}
    found = plan(settings(teacher, tmp_path / "s", **ways, **more))
    real = dump(settings(teacher, tmp_path / "s", **ways, **more))
    split = real["splits"]["train"]
    assert abs(found["bytes"] / real["bytes"] - 1) < 0.1
    assert (found["samples"], found["tokens"], found["shards"]) == (split["samples"], split["tokens"], split["shards"])
    assert (found["samples"] < 250) == ("packing" in more)
    assert found["bytes_per_sample"] == pytest.approx(found["bytes"] / found["samples"], abs=0.01)


def test_a_budget_chooses_and_is_kept_to(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = plan(settings(teacher, tmp_path / "s"))["candidates"]
    wanted = next(one for one in table if one["name"] == "top 32, float16")
    better = [one for one in table if one["bytes"] <= wanted["bytes"] and one["kl"] < wanted["kl"]]
    found = dump(settings(teacher, tmp_path / "s", budget=wanted["bytes"], shard_size=200_000))
    chosen = json.loads((tmp_path / "s" / "plan.json").read_text())["settings"]
    assert found["bytes"] <= wanted["bytes"] and chosen["budget"] == wanted["bytes"]
    name = min([*better, wanted], key=lambda one: one["kl"])["settings"]
    assert {key: chosen[key] for key in name} == name
    monkeypatch.setattr(Capture, "__init__", lambda *_: pytest.fail("the teacher was loaded"))
    assert dump(settings(teacher, tmp_path / "s", budget=wanted["bytes"], shard_size=200_000))["complete"]
    monkeypatch.undo()
    with pytest.raises(StoreMismatch, match=r"settings\.budget differs"):
        dump(settings(teacher, tmp_path / "s", budget=2 * wanted["bytes"], shard_size=200_000))


def test_a_dump_of_varying_size_continues_as_it_was_planned(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"top_k_logits": 100, "top_p": 0.5, "shard_size": 60_000}
    dump(settings(teacher, tmp_path / "s", **asked))
    said = json.loads((tmp_path / "s" / "plan.json").read_text())["settings"]
    kept = TeacherStore.open(tmp_path / "s").select(split="train")
    counts = np.concatenate([kept[at][TOP_K_COUNTS] for at in range(len(kept))])
    assert said[budget.ENTRIES] == pytest.approx(counts.mean(), rel=0.1)
    (tmp_path / "s" / "store.json").unlink()
    shard = sorted((tmp_path / "s" / "shards").glob("*.arrow"))[1]
    before = shard.read_bytes()
    for one in (shard, shard.with_suffix(".json")):
        one.unlink()
    monkeypatch.setattr(budget, "settle", lambda *_: pytest.fail("it was measured again"))
    dump(settings(teacher, tmp_path / "s", **asked))
    assert shard.read_bytes() == before


def test_a_budget_that_nothing_fits(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--budget 0.02 MB: the smallest store would have .* MB \(.*\); give that"):
        dump(settings(teacher, tmp_path / "s", budget="20kB"))
    with pytest.raises(ConfigError, match="--budget chooses --top-k-logits itself"):
        settings(teacher, tmp_path / "s", budget="1GB", top_k_logits=3)


@pytest.mark.parametrize("more", [{"device_map": "auto", "device": "auto"}, {"compile": True}])
def test_teachers_that_are_spread_or_compiled(
    teacher: Path, tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("compares runs on a CPU")
    eager = functools.partialmethod(torch.nn.Module.compile, backend="eager")  # what it compiles to is not ours
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    for name, each in (("plain", {}), ("other", more)):
        dump(settings(teacher, tmp_path / name, 20, top_k_logits=9, dtype="float32", **each))
    plain, other = (TeacherStore.open(tmp_path / name).select(split="train") for name in ("plain", "other"))
    for at in range(20):
        np.testing.assert_allclose(plain[at][TOP_K_LOGITS], other[at][TOP_K_LOGITS], atol=1e-5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"top_k_logits": -1}, "--top-k-logits is a whole number from 0"),
        ({"sampled_logits": 256}, "--sampled-logits is at most 255; got 256"),
        ({"sampled_logits": 8, "top_p": 0.5}, "--sampled-logits is kept instead of --top-k-logits and --top-p"),
        ({"sample_temperature": 2.0}, "--sample-temperature 2 is for --sampled-logits; give both"),
        ({"temperatures": [0.0]}, "--temperatures: numbers from 0.001 to 1e.06 expected; got 0"),
        ({"top_p": 1.5}, "--top-p is above 0 and at most 1; got 1.5"),
        ({"positions": "some"}, "--positions is one of all, completion"),
        ({"device_map": "auto"}, "--device-map auto chooses devices, and so does --device"),
        ({"task": "text-classification", "packing": True}, "--packing is nothing that text-classification knows"),
        ({"task": "text-classification", "dtype": "int8"}, "--dtype is one of float16, bfloat16, float32; got 'int8'"),
        ({"top_k_logits": VOCABULARY + 1}, f"--top-k-logits {VOCABULARY + 1}: the teacher has {VOCABULARY} entries"),
    ],
)
def test_settings_that_cannot_be(teacher: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dump(settings(teacher, tmp_path / "s", 20, **more))
