"""Ensemble stores: the teachers of several stores in one, each read as its own store, trained from as all of them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import merge_cases
import numpy as np
import pyarrow as pa
import pytest
import torch
from classification_store import MISSING, random_rows, write_store
from click.testing import CliRunner
from dump_cases import bert, own_cache, rows, settings  # noqa: F401  a fixture
from dump_cases import write as write_rows
from language_store import write_store as write_language
from merge_cases import HIDDEN, LOGITS, TEXT, write
from predistill.cli import cli
from predistill.report_page.about_store import about_stores
from predistill.store import ConfigError, FieldSpec, StoreCorrupt, StoreMismatch, TeacherStore, manifest
from predistill.store.convert.config import DropConfig, ExportConfig, MergeConfig
from predistill.store.convert.drop import drop
from predistill.store.convert.export import export
from predistill.store.convert.merge import merge
from predistill.store.remote.config import PullConfig
from predistill.store.remote.pull import pull
from predistill.store.verify import describe, verify
from predistill.student_train.train import train
from predistill.teacher_dump.dump import dump
from predistill.teacher_dump.recheck import recheck
from predistill.teacher_dump.rechecking.config import RecheckConfig
from transformers import AutoTokenizer

SUMMARY = FieldSpec("teacher_entropy", (), "float32", role="summary")
ROWS = {"train": range(20), "validation": range(30, 39)}
FAST = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "max_steps": 4, "use_cpu": True}


@pytest.fixture(autouse=True)
def summaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows also have an entropy, which tells teachers apart: 97 and the number of the text for teacher a."""
    monkeypatch.setenv("PREDISTILL_CACHE", str(tmp_path / "cache"))
    plain = merge_cases.row
    monkeypatch.setattr(
        merge_cases, "row", lambda n, who="a": {**plain(n, who), "teacher_entropy": np.float32(ord(who) + n)}
    )


def merged(output: Path, *stores: Path | str) -> Path:
    said = merge(MergeConfig([str(store) for store in stores], str(output)))
    assert said["merged"] == "teachers"
    found = verify(output)
    assert found["ok"], found["problems"]
    return output


def refusal(*stores: Path, kind: type[Exception] = StoreMismatch) -> str:
    with pytest.raises(kind) as caught:
        merge(MergeConfig([str(store) for store in stores], str(stores[0].parent / "refused")))
    assert not (stores[0].parent / "refused").exists() and "\n" not in str(caught.value)
    return str(caught.value)


def three(folder: Path) -> list[Path]:
    """Teachers a, b and c of the same rows, cut into other shards; the second has the inside too, the third no text."""
    fields = [(LOGITS, TEXT, SUMMARY), (LOGITS, HIDDEN, SUMMARY), (LOGITS, SUMMARY)]
    return [
        write(folder / name, ROWS, fields=each, teacher=name, shard_rows=size)
        for name, each, size in zip("abc", fields, (7, 4, 20), strict=True)
    ]


def column(path: Path, name: str) -> list[Any]:
    """By pyarrow alone, shard after shard."""
    shards = json.loads((path / "store.json").read_text())["plan"]["shards"]
    names = [f"{one['split']}-{one['number']:05d}.arrow" for one in shards]
    files = [pa.ipc.open_file(pa.memory_map(str(path / "shards" / one))) for one in names]
    return [value for file in files for value in file.read_all().column(name).to_pylist()]


def test_each_teacher_is_read_as_the_store_it_was(tmp_path: Path) -> None:
    sources = three(tmp_path)
    made = merged(tmp_path / "three", merged(tmp_path / "two", *sources[:2]), sources[2])
    for prefix, source in zip(("teacher", "teacher2", "teacher3"), sources, strict=True):
        assert column(made, f"{prefix}_logits") == column(source, "teacher_logits")
    assert column(made, "text") == column(sources[0], "text")
    with TeacherStore.open(made) as store:
        assert list(store.fields) == [
            "input_ids", "labels", "teacher_logits", "text", "teacher_entropy", "teacher2_logits",
            "teacher2_hidden_states_01", "teacher2_entropy", "teacher3_logits", "teacher3_entropy",
        ]  # fmt: skip
        assert store.sql("SELECT min(teacher_entropy), min(teacher2_entropy) FROM samples").fetchall() == [(97, 98)]
        for member, path in zip(store.members, sources, strict=True):
            own = TeacherStore.open(path)
            assert set(member.fields) == {*own.fields, "text"} and member.members == [member]
            assert all(member.fields[name] == spec for name, spec in own.fields.items())
            left, right = (one.select("validation", "teacher_entropy % 2 = 1") for one in (member, own))
            again = pickle.loads(pickle.dumps(left))[:]
            assert len(left) == len(right) > 3
            for name, values in right[:].items():
                same = values == again[name] if name == "text" else np.array_equal(again[name], values, equal_nan=True)
                assert same, name
        prints = {one.to_dataset("train")._fingerprint for one in [store, *store.members]}
        assert len(prints) == 4, "each is cached by `datasets` as its own"
    said = describe(made)
    assert [one["teacher"]["weights_sha256"][0] for one in said["teachers"]] == ["a", "b", "c"]
    shown = CliRunner().invoke(cli, ["info", str(made)]).stdout
    assert "teacher2_…" in shown and "bbbbbbbbbbbb" in shown
    card = (made / "README.md").read_text()
    assert "data by 3 teachers" in card and "| teacher3_… |" in card


def test_more_rows_parts_drops_and_exports_keep_the_teachers(tmp_path: Path) -> None:
    sources = three(tmp_path)[:2]
    made = merged(tmp_path / "two", *sources)
    (tmp_path / "other").mkdir()
    fields = [(LOGITS, TEXT, SUMMARY), (LOGITS, HIDDEN, SUMMARY)]
    others = [
        write(tmp_path / "other" / path.name, {"train": range(50, 60)}, fields=each, teacher=path.name)
        for path, each in zip(sources, fields, strict=True)
    ]
    more = merged(tmp_path / "other" / "two", *others)
    config = MergeConfig([str(made), str(more)], str(tmp_path / "both"))
    merge(config)
    second = TeacherStore.open(tmp_path / "both").members[1]
    assert second.sql("SELECT max(teacher_entropy), count(*) FROM samples").fetchall() == [(98 + 59, 39)]
    turned = merged(tmp_path / "turned", *others[::-1])
    assert "identity.teacher" in refusal(made, turned)

    far = TeacherStore.open(made.as_uri()).members[1].select("validation", "teacher_entropy > 130")
    assert far.column("teacher_entropy").tolist() == [98 + n for n in range(33, 39)]
    pull(PullConfig(made.as_uri(), str(tmp_path / "part"), fields=["teacher2_logits"]))
    [alone] = TeacherStore.open(tmp_path / "part").members
    assert alone.member == str(sources[1]) and "teacher_hidden_states_01" not in alone.fields
    assert np.array_equal(
        alone.select().column("teacher_logits"), TeacherStore.open(sources[1]).select().column(LOGITS.name)
    )
    assert "none of those whose outputs are there" in refusal(tmp_path / "part", sources[0])

    drop(DropConfig(str(made), "split = 'train' AND source_index >= 3", yes=True))
    left = TeacherStore.open(made).members[1].select("train")
    assert verify(made)["ok"] and left.column("teacher_entropy").tolist() == [98, 99, 100]
    export(ExportConfig(str(made), str(tmp_path / "exported"), "parquet"))
    said = json.loads((tmp_path / "exported" / "export.json").read_text())["teachers"]
    assert said == {"teacher_": str(sources[0]), "teacher2_": str(sources[1])}


def test_a_report_tells_teacher_by_teacher(tmp_path: Path) -> None:
    made = merged(tmp_path / "two", *three(tmp_path)[:2])
    said = about_stores(str(made))
    assert [one["name"] for one in said] == [f"two: {tmp_path / name}" for name in "ab"]
    hardest = [max(row["teacher_entropy"] for row in one["hardest"]["rows"]) for one in said]
    assert hardest == [97 + 38, 98 + 38]
    assert [sorted({field["name"][:8] for field in one["fields"]} & {"teacher_", "teacher2"}) for one in said] == [
        ["teacher_"], ["teacher2"]
    ]  # fmt: skip
    assert not any("teacher2" in name for one in said for name in one["hardest"]["columns"])


def test_refusals_name_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "a", ROWS)

    def other(name: str, **more: Any) -> Path:
        return write(tmp_path / name, ROWS, **{"teacher": "b", "fields": (LOGITS,), **more})

    said = refusal(one, other("tokens", identity={"tokenizer": {"sha256": "7" * 64}}))
    assert f"identity.tokenizer.sha256 differs: {one} has null" in said and f"predistill train {one}" in said
    assert "label_names differs" in refusal(one, other("names", label_names=["x", "z", "y"]))
    assert "settings.problem_type" in refusal(one, other("kind", settings={"problem_type": "regression"}))
    note = FieldSpec("teacher2_logits", (), "any", codec="arrow", role="carried")
    plain = merge_cases.row
    monkeypatch.setattr(merge_cases, "row", lambda n, who="a": {**plain(n, who), "labels": np.float32(n % 7 == 3)})
    labels = other("labels")
    monkeypatch.setattr(merge_cases, "row", plain)
    assert "column labels differs" in refusal(one, labels) and "train source_index 0;" in refusal(one, labels)
    assert "has the name of another teacher's column" in refusal(
        other("carried", fields=(LOGITS, note), teacher="c"), one
    )
    two = other("b")
    made = merged(tmp_path / "two", one, two)
    said = refusal(made, other("inside", fields=(LOGITS, HIDDEN)), kind=ConfigError)
    assert f"{tmp_path / 'inside'} and {made} both have teacher" in said
    mixed = refusal(one, two, write(tmp_path / "fields", ROWS, fields=(LOGITS, HIDDEN)), kind=ConfigError)
    assert "the same rows of another teacher" in mixed and "merge one after the other" in mixed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said[1].update(prefix="input_"), "prefixes teacher_, teacher2_"),
        (lambda said: said[1].update(name="x\ny"), "printable, on one line"),
        (lambda said: said[1].update(name=said[0]["name"]), "two teachers of one name"),
        (lambda said: said[1].pop("settings"), "is no list of teachers"),
    ],
)
def test_a_strangers_list_of_teachers(tmp_path: Path, change: Any, message: str) -> None:
    made = merged(tmp_path / "two", *three(tmp_path)[:2])
    said = json.loads((made / "store.json").read_text())
    change(said["plan"]["identity"]["teachers"])
    manifest.write_json(made / "store.json", manifest.sealed(said))
    with pytest.raises(StoreCorrupt, match=message) as caught:
        TeacherStore.open(made).members  # noqa: B018
    assert "\n" not in str(caught.value)
    assert any(message.split(",")[0] in one["detail"] for one in verify(made)["problems"])


# ---- training ----


@pytest.fixture(scope="module")
def judges(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str, str]:
    """(three stores of the same rows by other teachers, the ensemble store of them, a student's config)"""
    folder, tokenizer = tmp_path_factory.mktemp("judges"), AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    splits = {
        split: random_rows(count, at) for at, (split, count) in enumerate({"train": 40, "validation": 30}.items())
    }
    labels = {split: np.arange(len(each)) % 2 for split, each in splits.items()}
    labels["train"][5::4] = MISSING
    stores = []
    for seed in range(3):
        generator = np.random.default_rng(seed)
        logits = {split: np.eye(2)[np.arange(len(each)) % 2] + generator.normal(0, 1 + seed, (len(each), 2))
                  for split, each in splits.items()}  # fmt: skip
        write_store(folder / f"judge {seed}", splits, logits, labels, label_names=["no", "yes"], tokenizer=tokenizer,
                    tokenizer_dir=tiny_tokenizer_dir, identity={"teacher": {"name": f"org/judge-{seed}"}})  # fmt: skip
        stores.append(str(folder / f"judge {seed}"))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    student = folder / "tiny.json"
    student.write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 64, **shape}))
    return stores, str(merged(folder / "all", *stores)), str(student)


def run(stores: Sequence[str], student: str, output: Path, **more: Any) -> dict[str, Any]:
    return train({"stores": list(stores), "student_config": student, "output_dir": str(output),
                  "training_arguments": {**FAST, "logging_steps": 1}, **more})  # fmt: skip


def comparable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without times; what is said of each teacher in the order of the teachers, not by the names of stores."""
    kept = {name: value for name, value in metrics.items() if name.startswith(("train_loss", "eval_"))}
    kept = {name: value for name, value in kept.items() if not name.endswith(("runtime", "per_second"))}
    weights = metrics["ensemble"]["weights"]
    return {name: list(value.values()) if isinstance(value, dict) else value for name, value in
            {**kept, "weights": weights, "average": metrics["ensemble"]["average"]}.items()}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {"alpha": 0.7, "temperature": 2.0},
        {"ensemble_weights": "learned", "ensemble_average": "logits", "where": "teacher_confidence < 0.95"},
        {"ensemble_weights": "confidence", "pseudo_labels": 1.0, "pseudo_label_confidence": 0.6},
    ],
)
def test_it_trains_as_its_stores_do_bit_for_bit(judges: Any, tmp_path: Path, more: dict[str, Any]) -> None:
    stores, whole, student = judges
    apart, together = run(stores, student, tmp_path / "apart", **more), run([whole], student, tmp_path / "all", **more)
    assert comparable(together) == comparable(apart)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("apart", "all")]
    assert weights[0] == weights[1]
    losses = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("apart", "all")
    ]
    assert [[one.get("loss") for one in each] for each in losses][0] == [one.get("loss") for one in losses[1]]
    assert list(together["eval_member_accuracy"]) == [f"{whole}:org/judge-{seed}" for seed in range(3)]
    made = json.loads((tmp_path / "all" / "predistill.json").read_text())
    assert [one["teacher"]["name"] for one in made["stores"]] == [f"org/judge-{seed}" for seed in range(3)]


def test_beside_other_stores_and_refused_settings(judges: Any, tmp_path: Path) -> None:
    stores, whole, student = judges
    two = merged(tmp_path / "two", *stores[:2])
    more = {"ensemble_weights": "3,2,1"}
    apart, mixed = (
        run(stores, student, tmp_path / "apart", **more),
        run([str(two), stores[2]], student, tmp_path / "m", **more),
    )
    assert comparable(mixed) == comparable(apart)
    disagree = {"where": "(teacher_confidence > 0.7) <> (teacher2_confidence > 0.7)"}
    made = run([whole], student, tmp_path / "disagree", **disagree)
    assert 0 < json.loads((tmp_path / "disagree" / "predistill.json").read_text())["rows"] < 40 and made["ensemble"]
    for setting, message in (
        ({"several_stores": "concatenate"}, f"--several-stores has no part in {whole}"),
        ({"ensemble_weights": "1,2"}, "a number for each of 3 stores expected; got 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            run([whole], student, tmp_path / "x", **setting)


def test_language_models_with_positions_and_counts(tmp_path: Path) -> None:
    """Positions are there once, counts of kept logits are each teacher's own."""
    texts = {"train": [([*range(2 + n % 5)], [-100, *range(1, 2 + n % 5)]) for n in range(23)]}
    for seed, name in enumerate("ab"):

        def teacher(ids: Sequence[int], seed: int = seed) -> torch.Tensor:
            each = [torch.Generator().manual_seed(100 * seed + one) for one in ids]
            return torch.stack([torch.randn(40, generator=one) * 3 for one in each])

        identity = {"teacher": {"weights_sha256": name * 64, "name": name}}
        write_language(tmp_path / name, texts, teacher, kind="top-k", top_p=0.8, completion=True, identity=identity,
                       shard_rows=6 + seed)  # fmt: skip
    with TeacherStore.open(merged(tmp_path / "both", tmp_path / "a", tmp_path / "b")) as store:
        assert {"teacher_positions", "teacher2_top_k_counts"} <= set(store.fields)
        assert "teacher2_positions" not in store.fields
        for member in store.members:
            own = TeacherStore.open(tmp_path / str(member.member))
            left, right = (one.select("train")[[3, 9, 22]] for one in (member, own))
            assert left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in right)


# ---- the live teacher ----


def test_verify_asks_the_teacher_whose_weights_these_are(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    data = f"train={write_rows(tmp_path / 'a.jsonl', rows(24))}"
    teachers = [bert(tiny_tokenizer_dir, tmp_path / "one"), bert(tiny_tokenizer_dir, tmp_path / "two", num_labels=2)]
    disturb(teachers[1])
    for teacher in teachers:
        dump(settings(teacher, data, tmp_path / f"store of {teacher.name}"))
    made = merged(tmp_path / "both", *(tmp_path / f"store of {teacher.name}" for teacher in teachers))
    for teacher in teachers:
        found = recheck(made, RecheckConfig(teacher=str(teacher), device="cpu", sample=9))
        assert found["member"] == teacher.name and not found["problems"] and not found["differences"]
    wrong = recheck(made, RecheckConfig(teacher=str(teachers[0]), device="cpu", sample=9, member="2"))
    assert wrong["member"] == "two" and wrong["problems"]
    stranger = Path(shutil.copytree(teachers[1], tmp_path / "stranger"))
    disturb(stranger)
    words = ["verify", str(made), "--teacher", str(stranger), "--device", "cpu"]
    said = CliRunner().invoke(cli, words)
    assert said.exit_code == 1 and "--member which of one, two" in said.stderr.splitlines()[-1]
    said = CliRunner().invoke(cli, [*words, "--member", "three"])
    assert said.exit_code == 1 and "--member three: the teachers of" in said.stderr
    with pytest.raises(ConfigError, match="--member is for an ensemble store"):
        recheck(tmp_path / "store of one", RecheckConfig(teacher=str(teachers[0]), member="one"))


def disturb(teacher: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(teacher / "model.safetensors")
    save_file({name: one + 0.05 for name, one in weights.items()}, teacher / "model.safetensors", {"format": "pt"})
