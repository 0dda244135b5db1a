"""Teachers larger than one device: spread by accelerate, split over ranks, or run elsewhere and imported."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from import_cases import lines, vllm_row
from language_cases import LINES, byte_level, llama, own_cache, saved, settings, write  # noqa: F401
from predistill.store import ConfigError, TeacherStore
from predistill.store.verify import verify
from predistill.teacher_dump import capture
from predistill.teacher_dump.dump import dump
from predistill.teacher_dump.recheck import recheck
from predistill.teacher_dump.rechecking.config import RecheckConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

KEPT: dict[str, Any] = {"fields": ["logits", "hidden_states"], "top_k_logits": 9, "shard_size": 100_000}
SHARED: dict[str, Any] = {"device": "auto", "tp_plan": "auto"}
UNITS = 64 * 2.0**-23  # of the largest value: what verify allows float32 for rounding in another order


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = llama(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    return saved(tmp_path_factory.mktemp("teacher"), model, byte_level())


def rows(folder: Path, count: int) -> Path:
    return write(folder / "rows.jsonl", [{"text": LINES[at % 5] * (1 + at % 3)} for at in range(count)])


def close(left: Path, right: Path) -> None:
    """The same rows; what the teacher says differs by the rounding of float32 at most."""
    one, other = (TeacherStore.open(path).select(split="train") for path in (left, right))
    assert len(one) == len(other)
    for at in range(len(one)):
        for name, values in one[at].items():
            bound = UNITS * max(np.abs(values).max(), 1) if values.dtype.kind == "f" else 0
            assert np.abs(values - other[at][name]).max() <= bound, name


# ---- device_map ----


@pytest.mark.parametrize("tied", [False, True])
def test_weights_on_disk_give_the_same_bytes_and_the_head_runs_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    import transformers.integrations.accelerate as placing

    folder = saved(tmp_path / "teacher", llama(num_hidden_layers=4, tie_word_embeddings=tied), byte_level())
    data = rows(tmp_path, 20)
    dump(settings(folder, data, tmp_path / "plain", **KEPT))
    monkeypatch.setattr(placing, "accelerate_max_memory", lambda *_: {"cpu": 25_000})  # bytes; the teacher has 70,000
    models: list[Any] = []
    of = capture.devices_of

    def devices_of(model: Any) -> list[torch.device]:
        models.append(model)
        return of(model)

    monkeypatch.setattr(capture, "devices_of", devices_of)
    dump(settings(folder, data, tmp_path / "spread", **KEPT, device="auto", device_map="auto"))
    assert "disk" in models[0].hf_device_map.values()
    assert "cannot be run apart" not in capsys.readouterr().err
    for shard in sorted((tmp_path / "plain/shards").glob("*.arrow")):
        assert (tmp_path / "spread/shards" / shard.name).read_bytes() == shard.read_bytes()
    assert (tmp_path / "spread/plan.json").read_bytes() == (tmp_path / "plain/plan.json").read_bytes()


def test_inputs_go_to_the_first_device_that_computes() -> None:
    model = torch.nn.Linear(1, 1)
    assert capture.devices_of(model) == []
    for places, computing in (
        (["cpu", "cuda:1", "disk", "cuda:0", "cuda:1"], ["cuda:1", "cuda:0"]), (["disk", "cpu"], ["cpu"]),
    ):  # fmt: skip
        model.hf_device_map = dict(enumerate(places))  # type: ignore[assignment]
        assert capture.devices_of(model) == [torch.device(one) for one in computing]


def test_copies_of_every_device_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of a spread teacher come from several; one event waits for one device."""

    made: list[Any] = []

    class Event:
        def __init__(self, device: torch.device):
            self.device, self.waited = device, False
            made.append(self)

        def synchronize(self) -> None:
            self.waited = True

    monkeypatch.setattr(capture, "now", Event)
    with FakeTensorMode():
        fields = {f"of_{at}": torch.ones(2, device=f"cuda:{at}") for at in (0, 1)}
        captured = capture.Captured(fields, 0.0, 1.0)
        monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: tensor)
        captured.arrays()
    assert {str(one.device) for one in made} == {"cuda:0", "cuda:1"} and all(one.waited for one in made)


# ---- tp_plan ----


def ranks(work: Callable[[], Any], folder: Path, count: int = 2, restarts: int = 0) -> list[tuple[Any, str]]:
    """(what `work` returned, what was said on stderr) of each rank, None where one failed; as torchrun starts them, but
    forked, for the time that imports take."""

    def run() -> Any:
        rank = os.environ["RANK"]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the launcher sends when one fails; they end by themselves
        sys.stderr = open(folder / f"{rank}.err", "a")  # noqa: SIM115  the process ends with it
        try:
            return work()
        except Exception as error:
            print(f"Error: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        finally:
            sys.stderr.flush()

    config = LaunchConfig(1, 1, count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
                          monitor_interval=0.1, max_restarts=restarts, run_id=folder.name)  # fmt: skip
    found: dict[int, Any] = {}
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    with warnings.catch_warnings(), contextlib.suppress(ChildFailedError):
        warnings.simplefilter("ignore", DeprecationWarning)  # forked beside threads, none of which is in use
        found = elastic_launch(config, run)()
    for one, handler in handlers.items():
        signal.signal(one, handler)
    said = [folder / f"{rank}.err" for rank in range(count)]
    return [(found.get(rank), one.read_text() if one.exists() else "") for rank, one in enumerate(said)]


def test_two_ranks_with_one_teacher_make_the_store_of_one_process(teacher: Path, tmp_path: Path) -> None:
    data = rows(tmp_path, 30)
    dump(settings(teacher, data, tmp_path / "one", **KEPT))
    asked = RecheckConfig(teacher=str(teacher), sample=10, tp_plan="auto")

    def work() -> Any:
        return dump(settings(teacher, data, tmp_path / "two", **KEPT, **SHARED)), recheck(tmp_path / "one", asked)

    (made, _), (also, said) = ranks(work, tmp_path)
    assert made == also and made[0]["complete"] and not made[1]["problems"] and not made[1]["differences"]
    assert not said  # rank 0 speaks
    assert (tmp_path / "two/plan.json").read_bytes() == (tmp_path / "one/plan.json").read_bytes()
    close(tmp_path / "one", tmp_path / "two")
    for lost in ("store.json", "shards/train-00000.json"):
        (tmp_path / "two" / lost).unlink()
    assert dump(settings(teacher, data, tmp_path / "two", **KEPT))["complete"]  # one device goes on where two were
    assert verify(tmp_path / "two")["ok"]


@pytest.mark.parametrize(
    ("more", "count", "words"),
    [
        ({"text_column": "no"}, 2, "no column 'no'"),  # before the other ranks hear of anything
        ({}, 3, "2 key heads are not shared evenly by 3 ranks"),  # on all of them
    ],
)
def test_what_stops_one_rank_stops_all_and_is_said_once(
    teacher: Path, tmp_path: Path, more: dict[str, Any], count: int, words: str
) -> None:
    data = rows(tmp_path, 4)
    found = ranks(lambda: dump(settings(teacher, data, tmp_path / "s", **SHARED, **more)), tmp_path, count)
    assert not any(made for made, _ in found)
    [line] = [said for _, said in found if said]
    assert words in line


def test_a_rank_is_killed_and_the_same_command_goes_on(teacher: Path, tmp_path: Path) -> None:
    """Which torchrun itself starts again, with --max-restarts."""
    data, folder = rows(tmp_path, 80), tmp_path / "killed"
    more = {**KEPT, "shard_size": 50_000, "tokens_per_batch": 64}

    def die() -> None:
        while len(list(folder.glob("shards/*.json"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> Any:
        if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            threading.Thread(target=die, daemon=True).start()
        return dump(settings(teacher, data, folder, **more, **SHARED))

    (made, said), (also, silence) = ranks(work, tmp_path, restarts=1)
    first, second = said.split("Error: a rank of this teacher is gone; the same command goes on\n")
    planned = int(re.findall(r"(\d+) to do", first)[0])
    assert 0 < int(re.findall(r"(\d+) to do", second)[0]) < planned and not silence
    assert made == also and made["complete"] and verify(folder)["ok"]
    dump(settings(teacher, data, tmp_path / "one", **more))
    close(tmp_path / "one", folder)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "--tp-plan auto splits the teacher over several ranks: torchrun"),
        ({"tp_plan": "all"}, "--tp-plan is auto; got 'all'"),
        ({"device": "cpu"}, "--tp-plan auto chooses devices, and so does --device"),
        ({"device_map": "auto"}, "--device-map auto chooses devices, and so does --tp-plan"),
        ({"fields": ["logits", "attentions"]}, "each rank has a part of attentions only"),
        ({"capture": ["model.layers.0.mlp"]}, "each rank has a part of model.layers.0.mlp only"),
        ({"compile": True}, "--tp-plan auto does not go with --compile"),
        ({"ray_workers": 2}, "--tp-plan auto does not go with --ray-workers"),
        ({"tp_plan": None, "device_map": "auto"}, "--device-map auto spreads the teacher of one process over all"),
        ({"tp_plan": None, "device_map": "some"}, "'balanced_low_0', 'sequential' but found some"),
    ],
)
def test_settings_that_cannot_be(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], words: str
) -> None:
    if more.get("device_map") == "auto":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=words):
        dump(settings(teacher, rows(tmp_path, 4), tmp_path / "s", **{**SHARED, **more}))


def test_a_teacher_that_transformers_cannot_split(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"text": "a", "label": 0}])
    given = settings(tiny_teacher_dir, data, tmp_path / "s", task="text-classification", **SHARED)
    found = ranks(lambda: dump(given), tmp_path)
    assert "has no plan for BertForSequenceClassification" in "".join(said for _, said in found)  # of either


# ---- run by another program ----


def test_what_vllm_says_is_imported_and_held_against_the_teacher(teacher: Path, tmp_path: Path) -> None:
    """The commands of docs/large_teachers.md, on log-probabilities of a live teacher as vLLM writes them."""
    from click.testing import CliRunner
    from predistill.cli import cli
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    asked = []
    for text in LINES * 4:
        tokens = tokenizer(text)["input_ids"][:40]
        with torch.no_grad():
            asked.append(vllm_row(tokens, model(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy(), k=20))

    def checked(name: str, content: list[dict[str, Any]]) -> Any:
        source, store = str(lines(tmp_path / f"{name}.jsonl", content)), str(tmp_path / name)
        made = CliRunner().invoke(cli, ["import", source, store, "--vocabulary", "416", "--teacher", "my-teacher"])
        assert made.exit_code == 0, made.stderr
        return CliRunner().invoke(cli, ["verify", store, "--teacher", str(teacher), "--sample", "200", "--json"])

    good = checked("good", asked)
    said = json.loads(good.stdout)["recheck"]
    assert good.exit_code == 0 and said["rows"] == 20 and said["fields"]["teacher_top_k_logits"]["worst"] <= 1
    _, entry, *_ = asked[7]["prompt_logprobs"][3].values()  # the first is the token itself
    entry["logprob"] -= 0.1  # more than float16 explains
    bad = checked("bad", asked)
    assert bad.exit_code == 1 and "row 7 of split train" in bad.stdout
