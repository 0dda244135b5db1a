"""`train` under torchrun: two ranks train as one, FSDP as DDP, and a run that lost a rank goes on at its row.

All is trained in one start of two ranks (rank_script.py); each test looks at a part of what it left.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classification_store import MISSING, write_store
from inner_cases import VOCABULARY, bert, write_inside
from language_store import write_store as write_texts
from predistill.store import TeacherStore
from predistill.store.errors import StoreMismatch
from predistill.student_train.train import train
from rank_script import KILLED_AT, runs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

pytestmark = pytest.mark.slow
WEIGHTS = "projections.safetensors"
ROWS = 44  # 6 global batches of 8 rows, the last of 4: 3 steps an epoch


def named_rows(count: int, first: int) -> list[list[int]]:
    """Rows that their first two tokens name; first: 1 of training, 50 of validation."""
    generator = np.random.default_rng(first)
    return [[first + at // 40, 1 + at % 40, *generator.integers(1, 59, at % 7)] for at in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores and students, one start of two ranks, and the same runs of one rank in `one`."""
    made = tmp_path_factory.mktemp("ranks")
    splits = {"train": named_rows(ROWS, 1), "validation": named_rows(9, 50)}
    generator = np.random.default_rng(0)
    logits = {name: generator.normal(0, 2, (len(rows), 3)) for name, rows in splits.items()}
    labels = {name: generator.integers(0, 3, len(rows)) for name, rows in splits.items()}
    labels["train"][generator.permutation(ROWS)[:19]] = MISSING  # two ranks seldom have as many
    write_store(made / "rows", splits, logits, labels)
    write_inside(made / "inside", bert(7, 4, 24, 4), splits, keep=["hidden_states", "attentions"])
    table = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    texts = {name: [(row, row) for row in rows] for name, rows in splits.items()}
    write_texts(made / "texts", texts, lambda ids: table[torch.as_tensor(ids)])
    for name, dropout in (("still", 0.0), ("dropping", 0.2)):
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32, num_labels=3, initializer_range=0.3, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        ).save_pretrained(made / name)  # fmt: skip
    for name, tied in (("decoder", True), ("untied", False)):
        LlamaConfig(
            vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied,
        ).save_pretrained(made / name)  # fmt: skip
    script = Path(__file__).with_name("rank_script.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         str(script), str(made)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "rank0]" in line)[-4000:]
    (made / "stdout").write_text(done.stdout)
    (made / "stderr").write_text(done.stderr)
    return made


def alone(folder: Path, name: str) -> Path:
    """The run of this name, by one rank with twice the rows a batch and without FSDP."""
    asked = runs(folder, 8)[name]
    output = folder / "one" / Path(asked["output_dir"]).name
    arguments = {key: value for key, value in asked["training_arguments"].items() if not key.startswith("fsdp")}
    train({**asked, "output_dir": str(output), "training_arguments": arguments})
    return output


def curve(run: Path) -> list[dict[str, float]]:
    """What each step and evaluation said of losses."""
    logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
    kept = [{key: value for key, value in log.items() if "loss" in key or "accuracy" in key} for log in logs]
    return [{key: value for key, value in one.items() if key != "train_loss"} for one in kept]


def same_run(one: Path, other: Path) -> None:
    ours, theirs = curve(one), curve(other)
    assert len(ours) == len(theirs) >= 6
    for left, right in zip(ours, theirs, strict=True):
        assert left.keys() == right.keys()
        assert left == pytest.approx(right, rel=1e-5, abs=1e-7)
    same_weights(one / "model.safetensors", other / "model.safetensors")


def same_weights(mine: Path, expected: Path) -> None:
    """But for the keys' biases, whose gradient is zero and its rounding errors, which Adam makes large, are not."""
    found = load_file(mine)
    for name, value in load_file(expected).items():
        if not name.endswith("key.bias"):
            np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def labels_of(folder: Path) -> list[int]:
    return TeacherStore.open(folder / "rows").select("train").column("labels").tolist()


def noted(path: Path) -> list[list[list[int]]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_ranks_train_as_one_with_twice_the_batch(folder: Path) -> None:
    one = alone(folder, "ddp")
    same_run(folder / "ddp", one)
    metrics, expected = (json.loads((run / "metrics.json").read_text()) for run in (folder / "ddp", one))
    assert metrics["student_parameters"] == expected["student_parameters"]
    assert (folder / "stdout").read_text() == ""
    assert (folder / "stderr").read_text().count("step 1: loss ") == 10, "rank 0 alone speaks, of ten runs and stages"
    labels = {tuple(row[:2]): label for row, label in zip(named_rows(ROWS, 1), labels_of(folder), strict=True)}
    counts = [
        [sum(labels[tuple(row)] != MISSING for row in batch) for batch in noted(folder / f"rows-0-{rank}.jsonl")[:12]]
        for rank in (0, 1)
    ]
    assert counts[0] != counts[1], "ranks have unlike numbers of labels"


@pytest.mark.parametrize("name", ["ddp, inside", "ddp, tied", "ddp, untied"])
def test_so_do_losses_of_the_inside_and_language_models(folder: Path, name: str) -> None:
    one = alone(folder, name)
    same_run(Path(runs(folder, 4)[name]["output_dir"]), one)
    last = f"checkpoint-6/{WEIGHTS}"
    assert (one / last).exists() == ("inside" in name), "projections"
    if (one / last).exists():
        same_weights(Path(runs(folder, 4)[name]["output_dir"]) / last, one / last)


def test_predictions_of_all_ranks_stand_in_source_order(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "ddp")
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([row])).logits for row in named_rows(9, 50)])
    for rank in (0, 1):
        found = json.loads((folder / f"predicted-{rank}.json").read_text())
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_another_number_of_ranks_goes_on_with_as_many_rows_a_batch(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "ddp", tmp_path / "ddp")
    for later in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "ddp" / later)
    asked = {**runs(folder, 8)["ddp"], "output_dir": str(tmp_path / "ddp"), "resume_from_checkpoint": "true"}
    train(asked)
    same_run(tmp_path / "ddp", folder / "ddp")
    with pytest.raises(StoreMismatch, match=r"rows a batch \(--per-device-train-batch-size times ranks\) differs .* 8"):
        train({**asked, "training_arguments": runs(folder, 4)["ddp"]["training_arguments"]})


def test_a_run_that_lost_a_rank_goes_on_at_its_row(folder: Path) -> None:
    for rank in (0, 1):
        half = json.loads((folder / f"half-{rank}.json").read_text())
        assert "model.safetensors" in half and "trainer_state.json" not in half, "it died while saving"
        whole = noted(folder / f"rows-whole-{rank}.jsonl")
        before, after = noted(folder / f"rows-0-{rank}.jsonl"), noted(folder / f"rows-1-{rank}.jsonl")
        assert len(whole) == 12 and before[-2 * KILLED_AT :] == whole[: 2 * KILLED_AT]
        assert after == whole[4:], "from checkpoint-2 on, in the middle of an epoch"
    ranks = [noted(folder / f"rows-whole-{rank}.jsonl") for rank in (0, 1)]
    for epoch in (slice(0, 6), slice(6, 12)):
        seen = [tuple(row) for rank in ranks for batch in rank[epoch] for row in batch]
        assert sorted(seen) == sorted((row[0], row[1]) for row in named_rows(ROWS, 1)), "each row once"
    assert curve(folder / "part") == curve(folder / "whole")
    one, other = (load_file(folder / name / "model.safetensors") for name in ("part", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fsdp_trains_as_one_rank_stage_by_stage(folder: Path) -> None:
    one = alone(folder, "fsdp")
    same_run(folder / "fsdp", one)
    first = "stage-1-inside/model.safetensors"
    same_weights(folder / "fsdp" / first, one / first)
    model, report = AutoModelForSequenceClassification.from_pretrained(folder / "fsdp", output_loading_info=True)
    assert not any(report.values())
    metrics = json.loads((folder / "fsdp" / "metrics.json").read_text())
    assert metrics["student_parameters"] == sum(one.numel() for one in model.parameters())


def test_projections_are_saved_and_resumed_under_fsdp(folder: Path) -> None:
    """The second run of it went on from checkpoint-2."""
    one = alone(folder, "fsdp, resumed")
    same_run(folder / "fsdp-1", one)
    assert load_file(one / "checkpoint-6/projections.safetensors")
    same_weights(folder / "fsdp-1/checkpoint-6/projections.safetensors", one / "checkpoint-6/projections.safetensors")


def test_a_language_model_under_fsdp_with_checkpoints_in_parts(folder: Path) -> None:
    same_run(folder / "fsdp-2", alone(folder, "fsdp, in parts"))
    assert (folder / "fsdp-2/checkpoint-6/pytorch_model_fsdp_0").is_dir()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder / "fsdp-2", output_loading_info=True)
    assert not any(loaded[1].values())
