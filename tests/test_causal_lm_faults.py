"""What a person may get wrong about language models, and what each is told: one line, before anything is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_cases import (
    CHATML,
    LINES,
    byte_level,
    llama,
    own_cache,  # noqa: F401  a fixture
    said,
    saved,
    settings,
    task_of,
    write,
)
from language_store import random_rows, write_store
from predistill.store import ConfigError, DataError, StoreMismatch, TeacherStore
from predistill.student_train.settings import DistillationSettings
from predistill.student_train.tasks.causal_lm import CausalLM
from predistill.student_train.train import train
from predistill.teacher_dump.dump import dump
from predistill.teacher_dump.rows.packing import check_causal
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

ROWS = [{"text": line} for line in LINES]
CHAT = [said("user", "what is the sky"), said("assistant", "it is blue")]
VOCABULARY = 40
BERT: dict[str, Any] = {"vocab_size": 416, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": 416, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("teacher"), llama(), byte_level(CHATML))


def bert(decoder: bool) -> BertLMHeadModel:
    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(**BERT, is_decoder=decoder)).eval()


# ---- teachers ----


def test_a_teacher_that_sees_what_comes_next_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "teacher", bert(decoder=False), byte_level())
    config = settings(folder, write(tmp_path / "rows.jsonl", ROWS), tmp_path / "store")
    with pytest.raises(ConfigError, match="BertLMHeadModel sees the tokens that it is to tell"):
        dump(config)
    assert not list((tmp_path / "store" / "shards").glob("*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        llama,
        lambda: bert(decoder=True),
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2)).eval(),
        lambda: MambaForCausalLM(MambaConfig(vocab_size=416, hidden_size=16, num_hidden_layers=1, state_size=4)).eval(),
    ],
)
def test_causal_teachers_pass(make: Callable[[], Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        check_causal(make().to(dtype), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bidirectional_teachers_do_not_pass(dtype: torch.dtype) -> None:
    with torch.inference_mode(), pytest.raises(ConfigError, match="not causal"):
        check_causal(nn.Module.to(bert(decoder=False), dtype), torch.device("cpu"))


def test_a_teacher_of_broken_weights_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    folder = saved(tmp_path / "teacher", model, byte_level())
    with pytest.raises(DataError, match="LlamaForCausalLM are NaN whatever it reads: look at its weights"):
        dump(settings(folder, write(tmp_path / "rows.jsonl", ROWS), tmp_path / "store"))
    assert "cannot be run apart" not in capfd.readouterr().err


def test_an_encoder_decoder_is_no_teacher_of_this_task(tmp_path: Path) -> None:
    small = T5Config(vocab_size=416, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    folder = saved(tmp_path / "teacher", T5ForConditionalGeneration(small), byte_level())
    with pytest.raises(ConfigError, match="a model with a head for this --task expected; transformers has none"):
        dump(settings(folder, write(tmp_path / "rows.jsonl", ROWS), tmp_path / "store"))


def test_packing_does_not_bring_a_warning_about_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level()
    model = GPT2LMHeadModel(GPT2Config(**GPT2, pad_token_id=tokenizer.pad_token_id)).eval()
    folder = saved(tmp_path / "teacher", model, tokenizer)
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    try:
        dump(settings(folder, write(tmp_path / "rows.jsonl", ROWS), tmp_path / "store", packing=True, max_length=16))
        logger.warning("We strongly recommend passing in an `attention_mask` since your input_ids may be padded.")
    finally:
        logger.removeHandler(caplog.handler)
    assert "attention_mask" not in caplog.text


# ---- rows ----


def test_a_column_messages_of_text_is_not_taken_for_text(teacher: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"messages": json.dumps(CHAT)}])
    with pytest.raises(DataError, match="'messages': lists of messages.*got string: give --text-column messages if"):
        task_of(settings(teacher, data, tmp_path / "store"))
    task, _ = task_of(settings(teacher, data, tmp_path / "store", text_column="messages"))
    assert task.settings["format"] == "text"


def test_prompt_and_completion_of_two_kinds(teacher: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": CHAT[1:]}])
    with pytest.raises(DataError, match="both of text, or both of lists of messages, expected; got string and list"):
        task_of(settings(teacher, data, tmp_path / "store"))


def test_tools_that_are_not_written_are_told_of(teacher: Path, tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "tools": [{"name": "look_up"}]}]
    task, _ = task_of(settings(teacher, write(tmp_path / "rows.jsonl", rows), tmp_path / "store"))
    assert "the column tools is not written into the conversations" in task.notices
    plain = [{"text": "a b", "tools": "hammer"}]
    task, _ = task_of(settings(teacher, write(tmp_path / "plain.jsonl", plain), tmp_path / "store"))
    assert not any("tools" in notice for notice in task.notices)


# ---- settings ----


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"label_column": "label"}, "--label-column is nothing that causal-lm knows; leave it away"),
        ({"label_names": ["a", "b"]}, "--label-names is nothing that causal-lm knows"),
        ({"label_order": "by-name"}, "--label-order is nothing that causal-lm knows"),
        ({"problem_type": "regression"}, "--problem-type is nothing that causal-lm knows"),
        ({"sampled_logits": 8, "dtype": "int8"}, "--dtype int8 is for the top k logits, and --sampled"),
        ({"temperatures": [1e-46]}, "--temperatures: numbers from 0.001 to 1e.06 expected; got 1e-46"),
        ({"sampled_logits": 8, "dtype": "float16", "sample_temperature": -1.0}, "--sample-temperature: numbers from"),
    ],
)
def test_settings_that_make_no_sense(more: dict[str, Any], words: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(teacher, write(tmp_path / "rows.jsonl", ROWS), tmp_path / "store", **more)


def test_a_confidence_without_pseudo_labels() -> None:
    with pytest.raises(ConfigError, match="--pseudo-label-confidence is for --pseudo-labels; give both"):
        DistillationSettings(pseudo_label_confidence=0.5)


# ---- training ----


def made(folder: Path, **more: Any) -> TeacherStore:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return write_store(folder, {"train": random_rows(8)}, lambda ids: table[list(ids)], **more)


def run(stores: list[TeacherStore], folder: Path, student: Path, **more: Any) -> dict[str, Any]:
    arguments = {"max_steps": 2, "use_cpu": True, **more.pop("training_arguments", {})}
    asked = {"student_config": str(student), "output_dir": str(folder), "training_arguments": arguments, **more}
    return train({"stores": [str(store.path) for store in stores], **asked})


@pytest.fixture
def student(tmp_path: Path) -> Path:
    path = tmp_path / "student.json"
    path.write_text(json.dumps({"model_type": "gpt2", **GPT2, "vocab_size": VOCABULARY}))
    return path


def test_draws_of_another_number_or_temperature_are_not_mixed(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss weighs each draw by the number of all, and by its ratio: both are read of the first store."""
    twelve = made(tmp_path / "twelve", kind="sampled")
    monkeypatch.setattr("language_store.DRAWS", 6)
    six = made(tmp_path / "six", kind="sampled")
    with pytest.raises(StoreMismatch, match=r"column teacher_sample_counts differs: .*draws=12.*draws=6"):
        run([twelve, six], tmp_path / "out", student)
    assert not (tmp_path / "out").exists()


def test_a_column_that_only_the_second_store_has(student: Path, tmp_path: Path) -> None:
    fixed, to_p = made(tmp_path / "fixed"), made(tmp_path / "to_p", top_p=0.9)
    for stores in ([fixed, to_p], [to_p, fixed]):
        with pytest.raises(StoreMismatch, match="column teacher_top_k_"):
            run(stores, tmp_path / "out", student)


def test_a_log_sum_exp_that_only_one_store_has(student: Path, tmp_path: Path) -> None:
    """Where it is not read it does no harm; where it is, no zeros stand for it."""
    exact, plain = made(tmp_path / "exact", temperatures=[2]), made(tmp_path / "plain")
    assert run([exact, plain], tmp_path / "at-1", student)["train_loss"] < 10
    with pytest.raises(StoreMismatch, match="the loss reads teacher_logsumexp_at_2, which .*exact has and .*plain has"):
        run([exact, plain], tmp_path / "at-2", student, temperature=2.0)


def test_a_student_of_broken_weights_is_not_called_bidirectional(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(**GPT2)).eval()
    with torch.no_grad():
        model.transformer.wte.weight[0] = torch.nan
    with pytest.raises(ConfigError, match="gives logits that are NaN before it is trained"):
        CausalLM(made(tmp_path / "store")).check_student(model)


def test_an_output_folder_that_is_a_file(student: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="--output-dir .*out is a file; give a folder"):
        run([made(tmp_path / "store")], tmp_path / "out", student)
    assert (tmp_path / "out").read_text() == "mine"


def test_going_on_with_another_loss_says_what_differs(student: Path, tmp_path: Path) -> None:
    store = made(tmp_path / "store")
    run([store], tmp_path / "out", student, training_arguments={"save_steps": 1})
    with pytest.raises(StoreMismatch, match=r'it had {"temperature": 1.0}, this one has {"temperature": 4.0}: go on'):
        run([store], tmp_path / "out", student, temperature=4.0, resume_from_checkpoint="true")


def test_layers_of_a_teacher_that_is_no_language_model(student: Path, tmp_path: Path) -> None:
    T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    layers = {"student": "from-teacher-layers:1", "teacher": str(tmp_path / "t5"), "student_config": None}
    store = made(tmp_path / "store")
    with pytest.raises(ConfigError, match="the teacher in .* cannot be a AutoModelForCausalLM"):
        train({"stores": [str(store.path)], "output_dir": str(tmp_path / "out"), **layers})
