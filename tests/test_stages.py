"""Recipes of several stages: what is inside first, answers after; in one run, in one folder, and after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from inner_cases import VOCABULARY, write_inside
from predistill.cli import cli
from predistill.store.errors import ConfigError, StoreMismatch
from predistill.student_train.settings import TrainConfig
from predistill.student_train.train import train
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

FAST = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-3, "use_cpu": True,
        "logging_steps": 1}  # fmt: skip


def bert(width: int, layers: int, seed: int = 0) -> BertConfig:
    torch.manual_seed(seed)
    return BertConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
                      intermediate_size=16, max_position_embeddings=32, num_labels=2)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    teacher = BertForSequenceClassification(bert(16, 4))
    rows = [[2 + (7 * at + step) % (VOCABULARY - 2) for step in range(3 + at % 5)] for at in range(24)]
    folder = tmp_path_factory.mktemp("stores") / "inside"
    write_inside(folder, teacher, {"train": rows[:16], "validation": rows[16:]})
    return str(folder)


@pytest.fixture(scope="module")
def student_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("student")
    bert(8, 2).save_pretrained(folder)
    return str(folder)


def settings(store: str, student_config: str, output: Path, **more) -> dict:
    arguments = {**FAST, **more.pop("training_arguments", {})}
    return {"stores": [store], "student_config": student_config, "output_dir": str(output), **more,
            "training_arguments": arguments}  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "preset,first", [("tinybert", "intermediate"), ("haystack", "intermediate"), ("minilm", "relations")]
)
def test_a_preset_trains_its_stages_in_turn(store, student_config, tmp_path, preset, first, capfd) -> None:
    metrics = train(settings(store, student_config, tmp_path / "out", preset=preset))
    assert list(metrics["stages"]) == [first, "prediction" if first == "intermediate" else "fine-tuning"]
    assert "eval_accuracy" in metrics and metrics["stages"][first]["train_loss"] > 0
    err = capfd.readouterr().err
    assert f"stage 1 of 2, {first}" in err and "stage 2 of 2" in err
    before, after = weights(tmp_path / "out" / f"stage-1-{first}"), weights(tmp_path / "out")
    assert not any("projection" in name for name in {**before, **after})
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    model, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert metrics["student_parameters"] == sum(one.numel() for one in model.parameters())


def test_the_first_stage_leaves_the_head_alone(store, student_config, tmp_path) -> None:
    train(settings(store, student_config, tmp_path / "a", preset="tinybert"))
    longer = {"intermediate": {"num_train_epochs": 3}}
    train(settings(store, student_config, tmp_path / "b", preset="tinybert", stages=longer))
    a, b = (weights(tmp_path / name / "stage-1-intermediate") for name in "ab")
    assert torch.equal(a["classifier.weight"], b["classifier.weight"])
    assert not torch.equal(a["bert.embeddings.word_embeddings.weight"], b["bert.embeddings.word_embeddings.weight"])


def test_one_stage_of_a_preset(store, student_config, tmp_path) -> None:
    metrics = train(settings(store, student_config, tmp_path, preset="tinybert", stage="prediction"))
    assert "stages" not in metrics and not list(tmp_path.glob("stage-*"))


def test_stages_written_out_have_terms_epochs_and_rates_of_their_own(store, student_config, tmp_path) -> None:
    stages = {
        "inside": {"loss": "hidden_states:layers=0:0,2:4", "alpha": 1.0, "num_train_epochs": 2, "learning_rate": 5e-4},
        "answers": {"loss": "kl", "alpha": 0.5, "temperature": 3.0},
    }
    train(settings(store, student_config, tmp_path, stages=stages))
    made = json.loads((tmp_path / "predistill.json").read_text())
    inside, answers = made["stages"]
    assert [term["name"] for term in inside["terms"]] == ["hidden_states"]
    given = inside["training_arguments"]
    assert (given["num_train_epochs"], given["learning_rate"]) == (2, 5e-4)
    assert answers["training_arguments"]["num_train_epochs"] == 1
    weighed = [(term["name"], term["weight"], term["temperature"]) for term in answers["terms"]]
    assert weighed == [("labels", 0.5, None), ("logits", 0.5, 3.0)]
    card = (tmp_path / "README.md").read_text()
    assert "Stage *inside*, 2 epochs at 0.0005" in card and "| hidden_states | mse |" in card


def test_settings_of_a_run_beat_the_preset_and_those_of_a_stage_beat_both(store, student_config, tmp_path) -> None:
    own = {"intermediate": {"learning_rate": 7e-4}}
    train(settings(store, student_config, tmp_path, preset="tinybert", stages=own, layer_map="last"))
    first, last = json.loads((tmp_path / "predistill.json").read_text())["stages"]
    assert (first["training_arguments"]["learning_rate"], last["training_arguments"]["learning_rate"]) == (7e-4, 1e-3)
    assert {term["options"]["layers"] for term in first["terms"]} == {"last"}


KILLED = """
import json, os, signal, sys
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler
from predistill.student_train.train import train
folder, step = sys.argv[2], int(sys.argv[3])
ended = CallbackHandler.on_step_end
def on_step_end(self, args, state, control):
    result = ended(self, args, state, control)
    if os.path.realpath(args.output_dir) == os.path.realpath(folder) and state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
CallbackHandler.on_step_end = on_step_end
train(json.loads(sys.argv[1]))
"""


@pytest.mark.parametrize("stage,step", [("stage-1-intermediate", 5), (".", 3)])
def test_a_killed_run_goes_on_in_the_right_stage(store, student_config, tmp_path, stage, step) -> None:
    more = {"preset": "tinybert", "training_arguments": {"save_steps": 2, "num_train_epochs": 2}}
    train(settings(store, student_config, tmp_path / "whole", **json.loads(json.dumps(more))))
    given = settings(store, student_config, tmp_path / "out", **json.loads(json.dumps(more)))
    folder = str(tmp_path / "out" / stage)
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(given), folder, str(step)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    metrics = train({**given, "resume_from_checkpoint": "true"})
    assert list(metrics["stages"]) == ["intermediate", "prediction"]
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    first = "stage-1-intermediate"
    assert same(weights(tmp_path / "out" / first), weights(tmp_path / "whole" / first))


def test_another_loss_in_an_earlier_stage_is_another_run(store, student_config, tmp_path) -> None:
    train(settings(store, student_config, tmp_path, preset="tinybert"))
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(StoreMismatch, match="loss terms differs"):
        train(settings(store, student_config, tmp_path, preset="haystack", resume_from_checkpoint="true"))


def test_a_finished_run_is_not_overwritten_by_surprise(store, student_config, tmp_path) -> None:
    train(settings(store, student_config, tmp_path, preset="minilm"))
    with pytest.raises(ConfigError, match="holds another run"):
        train(settings(store, student_config, tmp_path, preset="minilm"))
    train(settings(store, student_config, tmp_path, overwrite_output_dir=True))
    assert not list(tmp_path.glob("stage-*"))


@pytest.mark.parametrize(
    "more,says",
    [
        ({"preset": "tinybert", "stage": "last"}, "--stage is one of intermediate, prediction; got 'last'"),
        ({"preset": "tinybert", "stages": {"first": {}}}, "preset tinybert has intermediate, prediction; got 'first'"),
        ({"preset": "tinybert", "stages": {"prediction": {"loss": "mse"}}}, "the preset says its loss"),
        ({"stages": "intermediate"}, "names with their settings, as a JSON object, expected; got 'intermediate'"),
        ({"stages": {"a b": {}}}, "a name of letters, digits and -"),
        ({"stages": {"one": {"epochs": 3}, "two": {}}}, "epochs is not a field of transformers.TrainingArguments"),
        ({"loss": "kl", "layer_map": "last"}, "no term of this loss has layers"),
        ({"preset": "tinybert", "loss": "mse"}, "has a loss of its own"),
    ],
)
def test_a_recipe_that_cannot_be(store, student_config, tmp_path, more, says) -> None:
    with pytest.raises(ConfigError) as raised:
        train(settings(store, student_config, tmp_path / "out", **more))
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_what_a_later_stage_lacks_is_said_before_the_first_is_trained(store, student_config, tmp_path) -> None:
    stages = {"one": {"loss": "kl"}, "two": {"loss": "hidden_states:layers=0:9"}}
    began = time.perf_counter()
    with pytest.raises(ConfigError, match="9"):
        train(settings(store, student_config, tmp_path / "out", stages=stages))
    assert not (tmp_path / "out" / "stage-1-one").exists() and time.perf_counter() - began < 60


def test_a_trainer_of_one_stage_asks_which() -> None:
    config = TrainConfig(stores=["s"], student="t", output_dir="o", preset="tinybert")
    with pytest.raises(ConfigError, match="stages intermediate, prediction"):
        config.terms()
    one = TrainConfig(stores=["s"], student="t", output_dir="o", preset="tinybert", stage="prediction")
    assert [term.name for term in one.terms()] == ["logits"]


def test_stages_in_a_file_and_as_json(store, student_config, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"stores: [{store}]\nstudent_config: {student_config}\noutput_dir: {tmp_path / 'out'}\npreset: tinybert\n"
        "use_cpu: true\nmax_steps: 3\nstages:\n  intermediate: {max_steps: 2, learning_rate: 1.0e-3}\n"
    )
    said = CliRunner().invoke(cli, ["train", "--config", str(file)])
    assert said.exit_code == 0 and "train_loss, intermediate" in said.stdout and "{" not in said.stdout
    assert "Stage *intermediate*, 2 steps at 0.001" in (tmp_path / "out" / "README.md").read_text()
    first, last = json.loads((tmp_path / "out" / "predistill.json").read_text())["stages"]
    assert (first["training_arguments"]["max_steps"], last["training_arguments"]["max_steps"]) == (2, 3)
    again = ["--stages", '{"prediction": {"max_steps": 1}}', "--overwrite-output-dir"]
    assert CliRunner().invoke(cli, ["train", "--config", str(file), *again]).exit_code == 0
    first, last = json.loads((tmp_path / "out" / "predistill.json").read_text())["stages"]
    assert (first["training_arguments"]["max_steps"], last["training_arguments"]["max_steps"]) == (3, 1)
