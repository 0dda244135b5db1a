"""Dumps of a language model against the teacher run in the test, a document at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_cases import (
    CHATML,
    LINES,
    byte_level,
    llama,
    own_cache,  # noqa: F401  a fixture
    prepared,
    rows_of,
    said,
    saved,
    settings,
    task_of,
    write,
)
from predistill.store import TeacherStore
from predistill.teacher_dump.dump import dump
from predistill.teacher_dump.logits.tokens import TokenLogits, row_uniforms
from predistill.teacher_dump.tasks import causal_lm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

TEXTS = [{"text": text} for text in LINES]
MIXED = [*TEXTS, *({"text": text.upper()} for text in LINES)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("teacher"), llama(), byte_level(CHATML))


def dumped(teacher: Path, rows: list[dict[str, Any]], folder: Path, **more: Any) -> TeacherStore:
    dump(settings(teacher, write(folder / "rows.jsonl", rows), folder / "store", **more))
    return TeacherStore.open(folder / "store")


def expected_rows(teacher: Path, samples: Any, packed: bool) -> list[torch.Tensor]:
    """float64 log-probabilities [S, V] of each row: each document of it alone through the teacher, no padding."""
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    found = []
    for at, ids in enumerate(rows_of(samples, "input_ids")):
        places = rows_of(samples, "position_ids")[at] if packed else list(range(len(ids)))
        cuts = [start for start, place in enumerate(places) if place == 0] + [len(ids)]
        with torch.no_grad():
            pieces = [model(torch.tensor([ids[a:b]])).logits[0] for a, b in zip(cuts, cuts[1:], strict=False)]
        found.append(torch.cat(pieces).double().log_softmax(-1))
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("positions", ["all", "completion"])
def test_a_store_is_what_the_teacher_says(packed: bool, positions: str, teacher: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"packing": packed, "positions": positions, "max_length": 24, "top_k_logits": 7}
    store = dumped(teacher, MIXED, tmp_path, temperatures=[2.0], **more)
    samples = prepared(settings(teacher, tmp_path / "rows.jsonl", tmp_path, **more))
    table = store.sql("select * from samples order by source_index, view").to_arrow_table()
    rows = store.select()[list(range(len(samples)))]
    for at, logprobs in enumerate(expected_rows(teacher, samples, packed)):
        ids, labels = rows_of(samples, "input_ids")[at], torch.tensor(rows_of(samples, "labels")[at])
        size, targets = len(ids), torch.tensor([*labels[1:].tolist(), -100])
        known = targets != -100
        kept = known if positions == "completion" else torch.ones(size, dtype=torch.bool)
        top, indices = logprobs.topk(7)
        assert rows["input_ids"][at, :size].tolist() == ids
        assert (rows["teacher_top_k_indices"][at, :size][kept] == indices[kept].numpy()).all()
        stored = torch.from_numpy(rows["teacher_top_k_logits"][at, :size] - rows["teacher_logsumexp"][at, :size, None])
        torch.testing.assert_close(stored[kept].double(), top[kept], atol=1e-4, rtol=0)
        own = logprobs.gather(1, targets.where(known, 0)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.from_numpy(rows["teacher_label_logprobs"][at, :size])[known].double(), own[known], atol=1e-4, rtol=0
        )
        if positions == "completion":
            assert (rows["teacher_mask"][at, :size] == kept.numpy()).all()
        each = logprobs[known]
        means = {
            "teacher_confidence": each.exp().amax(-1), "teacher_entropy": -(each.exp() * each).sum(-1),
            "teacher_loss": -own[known],
        }  # fmt: skip
        for name, values in means.items():
            assert table[name][at].as_py() == pytest.approx(values.mean().item(), abs=1e-4)


def test_batches_do_not_matter_to_draws(teacher: Path, tmp_path: Path) -> None:
    """A position's random number is its row's and its own."""
    stores = []
    for size in (32, 512):
        (folder := tmp_path / str(size)).mkdir()
        stores.append(dumped(teacher, MIXED, folder, sampled_logits=9, tokens_per_batch=size))
    one, other = (store.select()[list(range(len(MIXED)))] for store in stores)
    for name in ("teacher_sample_indices", "teacher_sample_counts", "teacher_sample_sizes"):
        assert (one[name] == other[name]).all()
    assert one["teacher_sample_counts"].sum(-1)[0, 0] == 9


def test_draws_are_given_the_numbers_of_their_positions(teacher: Path, tmp_path: Path) -> None:
    answers = ("It is blue.", "é")
    rows = [{"messages": [said("user", "What is the sky?"), said("assistant", one)]} for one in answers]
    config = settings(teacher, write(tmp_path / "rows.jsonl", rows), tmp_path, positions="completion", sampled_logits=4)
    task, table = task_of(config)
    samples, given = task.prepare("train", np.arange(2), table), {}

    class Kept(TokenLogits):
        def keep(self, head: Any, hidden: Any, targets: Any, uniforms: Any = None) -> Any:
            given.update(targets=targets.tolist(), uniforms=uniforms.tolist())
            return super().keep(head, hidden, targets, uniforms)

    batch = np.array([1, 0])
    inputs = {name: torch.from_numpy(value) for name, value in task.collate(samples, batch).items()}
    with torch.inference_mode():
        found = task.forward(llama(), inputs, samples, batch, kept=Kept(config, 416))
    labels = rows_of(samples, "labels")
    assert given["targets"] == [one for row in (1, 0) for one in labels[row] if one != -100]
    expected = [
        row_uniforms(samples.content_hash[row], len(labels[row]))[place]
        for row in (1, 0) for place in rows_of(samples, "teacher_positions")[row]
    ]  # fmt: skip
    assert given["uniforms"] == expected
    assert len(found["teacher_sample_sizes"]) == len(expected)


class OwnScale(GPT2LMHeadModel):
    """Logits that no name in the config explains."""

    def forward(self, *given: Any, **named: Any) -> Any:
        output = super().forward(*given, **named)
        output.logits = output.logits * 0.5 + 0.1 * output.logits.cos()
        return output


def test_a_head_that_cannot_be_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's own logits, some rows at a time, are the same as all at once; it is said once."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 416, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = OwnScale(GPT2Config(**shape, initializer_range=0.5, bos_token_id=0, eos_token_id=0)).eval()
    model.config.use_cache = False
    folder = saved(tmp_path / "teacher", model, byte_level())
    for more in ({}, {"packing": True, "max_length": 16}, {"positions": "completion", "top_p": 0.9}):
        config = settings(folder, write(tmp_path / "rows.jsonl", TEXTS), tmp_path, top_k_logits=5, **more)
        task, table = task_of(config)
        samples, made = task.prepare("train", np.arange(5), table), []
        batch = np.array([3, 0, 4])
        inputs = {name: torch.from_numpy(value) for name, value in task.collate(samples, batch).items()}
        with torch.inference_mode():
            for limit in (1, 2**28):
                monkeypatch.setattr(causal_lm, "_LOGITS_BYTES", limit)
                made.append(task.forward(model, inputs, samples, batch))
            logits = model(**inputs).logits.float()
        at = task.positions(samples, batch)
        expected = task.token_logits.keep_from_logits(
            logits[at.row, at.place], torch.from_numpy(task.targets(samples, batch, at))
        )
        assert capsys.readouterr().err.count("the head of OwnScale cannot be run apart") == 1
        for found in made:
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name].float(), value.float(), atol=1e-5, rtol=1e-5)


def test_packing_is_probed_before_a_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Path) -> None:
    data = write(tmp_path / "rows.jsonl", TEXTS)
    probed: list[Any] = []
    monkeypatch.setattr(causal_lm, "check_packing", lambda model, device: probed.append(model))
    dump(settings(teacher, data, tmp_path / "a", packing=True, max_length=16))
    dump(settings(teacher, data, tmp_path / "b"))
    assert len(probed) == 1


def test_padding_that_the_teacher_does_not_know(tmp_path: Path) -> None:
    """A padding token beyond the embeddings, added to the tokenizer alone, is never fed."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    vocabulary = tokenizer.pad_token_id
    folder = saved(tmp_path / "teacher", llama(vocabulary), tokenizer)
    store = dumped(folder, TEXTS, tmp_path, top_k_logits=3)
    assert store.select()[list(range(5))]["input_ids"].max() < vocabulary


def test_carried_columns_are_those_of_the_document_a_row_begins_in(teacher: Path, tmp_path: Path) -> None:
    rows = [{**row, "name": str(at)} for at, row in enumerate(MIXED)]
    more: dict[str, Any] = {"packing": True, "max_length": 16, "keep_columns": ["name"], "top_k_logits": 3}
    store = dumped(teacher, rows, tmp_path, **more)
    found = store.sql("select source_index, view, name from samples").fetchall()
    assert len(found) == len(set(found)) > len(rows)
    assert all(str(source) == name for source, _, name in found)
