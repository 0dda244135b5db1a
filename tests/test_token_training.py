"""Taggers learn from a store what they would learn beside the live teacher, word by word; and their folders load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dump_cases import own_cache, write  # noqa: F401  a fixture
from predistill.store import ConfigError, DataError, TeacherStore
from predistill.student_train.bilstm_cnn import load
from predistill.student_train.collator import DataCollatorForDistillation
from predistill.student_train.losses.terms import Term
from predistill.student_train.metrics import tag_scores
from predistill.student_train.tasks import task_of
from predistill.student_train.train import train
from predistill.student_train.words.rows import word_rows
from predistill.student_train.words.vocabulary import WordTokenizer, read_vectors
from predistill.teacher_dump.dump import dump
from token_cases import NAMES, firsts, online, sentences, settings, tagger
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

FAST = {"per_device_train_batch_size": 20, "learning_rate": 1e-2, "max_steps": 2, "use_cpu": True}
LONG = {"max_steps": 80, "eval_strategy": "steps", "eval_steps": 10_000, "warmup_steps": 5}  # evaluated at the end
SMALL = {"model_type": "bilstm-cnn", "word_embedding_size": 12, "hidden_size": 16, "num_hidden_layers": 1,
         "dropout": 0.0, "unknown_rate": 0.0}  # fmt: skip
TRAIN, VALIDATION = sentences(40), sentences(15, seed=3)


@pytest.fixture(scope="module")
def teacher(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagger(tiny_tokenizer_dir, tmp_path_factory.mktemp("taggers") / "teacher")


@pytest.fixture(scope="module")
def store(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> TeacherStore:
    folder = tmp_path_factory.mktemp("stores")
    data = f"train={write(folder / 'a.jsonl', TRAIN)},validation={write(folder / 'b.jsonl', VALIDATION)}"
    inner = {"fields": ["logits", "hidden_states"], "layers": "2"}
    dump(settings(teacher, data, folder / "store", shard_size=9000, **inner))
    return TeacherStore.open(folder / "store")


@pytest.fixture(scope="module")
def student(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT tagger of one layer, with the teacher's tokenizer."""
    return tagger(tiny_tokenizer_dir, tmp_path_factory.mktemp("taggers") / "student", seed=5, num_hidden_layers=1,
                  initializer_range=0.1, hidden_dropout_prob=0.0)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("students") / "small.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def run(store: TeacherStore, output: Path, **more: Any) -> dict[str, Any]:
    arguments = {**FAST, **more.pop("training_arguments", {})}
    given = {"stores": [str(store.path)], "output_dir": str(output), "training_arguments": arguments, **more}
    return train(given)


# ---- offline = online ----

TERMS = (
    Term("labels", weight=0.3),
    Term("logits", "kl", weight=0.7, temperature=2.0),
    Term("pseudo_labels", weight=0.2, options={"threshold": 0.6}),
)


def live(teacher: Path, model: Any, read: Any) -> torch.Tensor:
    """The loss of TRAIN written out: the teacher runs on each row alone. read(words) -> logits [words, C] of `model`,
    of each word's first token."""
    parts: dict[str, list[torch.Tensor]] = {"labels": [], "logits": [], "pseudo_labels": []}
    for row in TRAIN:
        logits, words = online(teacher, row["tokens"])
        theirs = logits[list(firsts(words).values())]
        own = read(row["tokens"])
        assert len(own) == len(theirs) == len(row["tokens"])
        p, q = (theirs / 2).softmax(-1), (own / 2).log_softmax(-1)
        parts["logits"].append(4 * F.kl_div(q, p, reduction="none").sum(-1))
        if row["ner_tags"]:
            tags = torch.tensor([NAMES.index(tag) for tag in row["ner_tags"]])
            parts["labels"].append(F.cross_entropy(own, tags, reduction="none"))
        else:
            sure = theirs.softmax(-1).amax(-1) >= 0.6
            parts["pseudo_labels"].append(F.cross_entropy(own[sure], theirs.argmax(-1)[sure], reduction="none"))
    means = [torch.cat(parts[term.name]).mean() for term in TERMS]
    return sum((term.weight * mean for term, mean in zip(TERMS, means, strict=True)), torch.zeros(()))


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def offline(store: TeacherStore, model: Any, rows: Any) -> torch.Tensor:
    objective = task_of(store).objective(TERMS)
    batch = DataCollatorForDistillation()(rows[list(range(len(TRAIN)))])
    accepted = ("input_ids", "attention_mask", "token_type_ids", "char_ids")
    inputs = {name: value for name, value in batch.items() if name in accepted}
    return objective.step(model, inputs, batch, objective.counts(batch)).loss


def check_same(model: Any, stored: torch.Tensor, lived: torch.Tensor) -> None:
    torch.testing.assert_close(stored, lived, rtol=1e-6, atol=1e-6)
    one, other = gradients(model, stored), gradients(model, lived)
    assert (one - other).norm() <= 1e-5 * other.norm()


def test_offline_is_online(store: TeacherStore, teacher: Path, student: Path) -> None:
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(student), AutoTokenizer.from_pretrained(student)

    def read(words: list[str]) -> torch.Tensor:
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        return model(**encoded).logits[0][list(firsts(encoded.word_ids(0)).values())]

    model.eval()
    rows = store.select("train", fields=["teacher_logits", "word_ids"])
    check_same(model, offline(store, model, rows), live(teacher, model, read))


def test_offline_is_online_for_students_of_words(
    store: TeacherStore, teacher: Path, small: str, tmp_path: Path
) -> None:
    run(store, tmp_path / "out", student_config=small, training_arguments={"max_steps": 1})
    model, tokenizer = load(tmp_path / "out")
    rows = word_rows(store.select("train", fields=["teacher_logits", "word_ids"]), tokenizer)
    online = live(teacher, model, lambda words: model(**tokenizer([words])).logits[0])
    check_same(model, offline(store, model, rows), online)


def test_students_with_another_tokenizer(store: TeacherStore, teacher: Path, tmp_path: Path) -> None:
    """Letters: every word is as many tokens as it has characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {one: at for at, one in enumerate(["[PAD]", "[UNK]", "[CLS]", *map(chr, range(33, 127))])}
    backend = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    own = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128)
    folder = tagger(teacher, tmp_path / "t", vocab_size=len(letters), max_position_embeddings=128, seed=9)
    own.save_pretrained(folder)
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()

    def read(words: list[str]) -> torch.Tensor:
        places = 1 + np.cumsum([0, *(len(word) for word in words[:-1])])
        return model(**own(words, is_split_into_words=True, return_tensors="pt")).logits[0][places]

    rows = word_rows(store.select("train", fields=["teacher_logits", "word_ids"]), own)
    store.settings["max_length"], kept = 128, store.settings["max_length"]
    rows = word_rows(store.select("train", fields=["teacher_logits", "word_ids"]), own)
    store.settings["max_length"] = kept
    check_same(model, offline(store, model, rows), live(teacher, model, read))
    assert "eval_f1" in run(store, tmp_path / "out", student=str(folder))
    with pytest.raises(ConfigError, match="hidden_states_02 is compared token by token, and this student has other"):
        run(store, tmp_path / "x", student=str(folder), loss="kl hidden_states:layers=last")


# ---- runs ----


def test_a_transformer_learns_and_loads(store: TeacherStore, student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = run(store, out, student=str(student), alpha=0.0, training_arguments=LONG)
    assert metrics["eval_f1"] > 0.8 and metrics["eval_accuracy"] > 0.9
    assert {"eval_precision", "eval_recall", "eval_teacher_agreement", "eval_loss_labels"} <= metrics.keys()
    model = AutoModelForTokenClassification.from_pretrained(out)
    assert model.config.id2label == dict(enumerate(NAMES))
    tokenizer, agreed, words = AutoTokenizer.from_pretrained(out), 0, 0
    rows = store.select("validation")
    for at, row in enumerate(VALIDATION):
        encoded = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        own = model(**encoded).logits[0].argmax(-1).numpy()
        places = list(firsts(encoded.word_ids(0)).values())
        agreed += int((own == rows[at]["teacher_logits"].argmax(-1))[places].sum())
        words += len(places)
    assert metrics["eval_teacher_agreement"] == pytest.approx(agreed / words)
    found = pipeline("token-classification", model=str(out), aggregation_strategy="first")("a warm film zzz")
    assert {one["entity_group"] for one in found} <= {"film", "person"}
    assert "Tags: `O`, `B-film`" in (out / "README.md").read_text()


def test_ways_to_learn(store: TeacherStore, student: Path, small: str, tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [
        {"preset": "nlp-architect"},
        {"preset": "nlp-architect", "pseudo_labels": 0.5, "pseudo_label_confidence": 0.5},
        {"loss": "mse", "alpha": 1.0},
        {"loss": "jsd:beta=0.3"},
        {"loss": "kl hidden_states:layers=last"},
    ]
    for number, more in enumerate(ways):
        assert np.isfinite(run(store, tmp_path / str(number), student=str(student), **more)["train_loss"])
    terms = json.loads((tmp_path / "1" / "predistill.json").read_text())["terms"]
    assert [(one["name"], one["weight"]) for one in terms] == [("labels", 1.0), ("logits", 0.1), ("pseudo_labels", 0.5)]
    for name, chosen in (("bert", {"student": str(student)}), ("words", {"student_config": small})):
        tagged = run(store, tmp_path / f"tags-{name}", alpha=0.0, **chosen)
        assert "eval_loss_logits" not in tagged and "eval_teacher_agreement" in tagged
        assert json.loads((tmp_path / f"tags-{name}" / "predistill.json").read_text())["rows"] == 32, "rows with tags"
    untagged = run(store, tmp_path / "pseudo", student=str(student), alpha=0.0, pseudo_labels=1.0)
    assert np.isfinite(untagged["train_loss"])


def test_the_size_that_is_promised(store: TeacherStore) -> None:
    from predistill.student_train.bilstm_cnn import BiLstmCnnConfig, BiLstmCnnForTokenClassification

    model = BiLstmCnnForTokenClassification(BiLstmCnnConfig(vocab_size=13_000, num_characters=120, num_labels=13))
    assert 2.5e6 < model.num_parameters() < 3.2e6


def test_how_fast_a_student_learns_when_nothing_is_said(small: str, tmp_path: Path) -> None:
    from predistill.student_train.settings import TrainConfig
    from predistill.student_train.train import training_arguments

    def rate(**more: Any) -> float:
        config = TrainConfig(stores=["stores/a"], output_dir=str(tmp_path), **more)
        return training_arguments(config, config.recipe(1.0), 0, None).learning_rate

    given = {"training_arguments": {"learning_rate": 1e-4}}
    assert rate(student="bert") == 5e-5 and rate(student="bilstm-cnn") == rate(student_config=small) == 2e-3
    assert rate(student="bilstm-cnn", **given) == rate(student="bert", **given) == 1e-4
    assert rate(student="bilstm-cnn", preset="tinybert", stage="prediction") == 3e-5, "a recipe says it"


def test_a_student_of_words(store: TeacherStore, small: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = run(store, out, student_config=small, alpha=0.0, training_arguments={**LONG, "learning_rate": 3e-2})
    assert metrics["eval_f1"] > 0.8
    model, tokenizer = load(out)
    assert metrics["student_parameters"] == model.num_parameters()
    assert type(AutoModelForTokenClassification.from_pretrained(out)) is type(model)
    assert set(tokenizer.words) == {word.lower() for row in TRAIN for word in row["tokens"]}, "of the train split"
    known = [row for row in VALIDATION if row["ner_tags"]]
    rows = [row["tokens"] for row in known]
    tags = model.tag([*rows, []], tokenizer, batch_size=4)
    truth = [tag for row in known for tag in row["ner_tags"]]
    right = sum(one == other for one, other in zip(sum(tags, []), truth, strict=True))
    assert tags[-1] == [] and right / len(truth) == pytest.approx(metrics["eval_accuracy"])
    assert len(model.tag([["Neverseen", "", "\u4f60"]], tokenizer)[0]) == 3
    card = (out / "README.md").read_text()
    assert "from predistill.student_train.bilstm_cnn import load" in card and "import pipeline" not in card
    again = run(store, tmp_path / "again", student=str(out), training_arguments={"max_steps": 1, "learning_rate": 1e-9})
    assert again["eval_f1"] == pytest.approx(metrics["eval_f1"]), "a saved one goes on"


LOADED = """
    import sys
    from transformers import AutoModelForTokenClassification
    import predistill.student_train.bilstm_cnn
    print(type(AutoModelForTokenClassification.from_pretrained(sys.argv[1])).__name__)
"""


def test_vectors_and_another_process(store: TeacherStore, small: str, tmp_path: Path) -> None:
    words = {"film": 0.5, "Xylo": 0.25, "FUNNY": 0.75, "funny": 1.0, "unheard of": 2.0}
    lines = [" ".join([word, *(str(value + at) for at in range(12))]) for word, value in words.items()]
    for name, text in (("glove", lines), ("word2vec", [f"{len(lines)} 12", *(f"{line} " for line in lines)])):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(text) + "\n")
        arguments = {"max_steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}
        run(store, tmp_path / name, student_config=small, student_vectors=str(path), training_arguments=arguments)
        model, tokenizer = load(tmp_path / name)
        for word, value in {"film": 0.5, "xylo": 0.25, "funny": 1.0}.items():
            found = model.words.weight[tokenizer.word_ids[word]].tolist()
            assert found == pytest.approx([value + at for at in range(12)], abs=1e-5)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADED), str(tmp_path / "glove")], capture_output=True, text=True
    )
    assert done.stdout.strip() == "BiLstmCnnForTokenClassification", done.stderr


KILLED = """
    import json, os, signal, sys
    from transformers import TrainerCallback
    from predistill.student_train import trainer as room
    from predistill.student_train.train import train
    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **more):
            os.kill(os.getpid(), signal.SIGKILL)
    made = room.DistillationTrainer.__init__
    def with_kill(self, *args, **more):
        made(self, *args, **more)
        self.add_callback(Kill())
    room.DistillationTrainer.__init__ = with_kill
    train(json.loads(sys.argv[1]))
"""


def test_a_killed_run_goes_on(store: TeacherStore, tmp_path: Path) -> None:
    arguments = {**FAST, "max_steps": 4, "save_strategy": "epoch"}
    given = {"stores": [str(store.path)], "student": "bilstm-cnn", "training_arguments": arguments}
    given_here = json.dumps({**given, "output_dir": str(tmp_path / "out")})
    command = [sys.executable, "-c", textwrap.dedent(KILLED), given_here]
    assert subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == -9
    resumed = train({**given, "output_dir": str(tmp_path / "out"), "resume_from_checkpoint": "true"})
    whole = train({**given, "output_dir": str(tmp_path / "whole")})
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)


# ---- refused ----


def test_what_is_refused(store: TeacherStore, student: Path, teacher: Path, small: str, tmp_path: Path) -> None:
    other = tagger(teacher, tmp_path / "other", NAMES[:3])
    with pytest.raises(DataError, match="has a head of 3 labels, the store's teacher has 5"):
        run(store, tmp_path / "x", student=str(other))
    with pytest.raises(ConfigError, match="--student-vectors v.txt: for --student bilstm-cnn; leave it away"):
        run(store, tmp_path / "x", student=str(student), student_vectors="v.txt")
    with pytest.raises(ConfigError, match="--student-vectors .*none.txt: a text file of word vectors expected"):
        run(store, tmp_path / "x", student="bilstm-cnn", student_vectors=str(tmp_path / "none.txt"))
    (tmp_path / "v.txt").write_text("film 1 2 3\na 1 x 3\n")
    with pytest.raises(DataError, match="v.txt, line 2: a word and 3 numbers expected"):
        run(store, tmp_path / "x", student="bilstm-cnn", student_vectors=str(tmp_path / "v.txt"))
    (tmp_path / "v.txt").write_text("unheard 1 2 3\n")
    with pytest.raises(DataError, match="vectors of words of the train split expected; there is not one"):
        run(store, tmp_path / "x", student="bilstm-cnn", student_vectors=str(tmp_path / "v.txt"))
    (tmp_path / "v.txt").write_text("film 1 2 3\n")
    with pytest.raises(ConfigError, match="has vectors of 3 numbers, and word_embedding_size is 12"):
        run(store, tmp_path / "x", student_config=small, student_vectors=str(tmp_path / "v.txt"))
    (tmp_path / "c.json").write_text(json.dumps({**SMALL, "layers": 3}))
    with pytest.raises(ConfigError, match="bilstm-cnn has no layers"):
        run(store, tmp_path / "x", student_config=str(tmp_path / "c.json"))
    says = "needs the student's layers, which only models of transformers tell|token by"
    with pytest.raises(ConfigError, match=says):
        run(store, tmp_path / "x", student="bilstm-cnn", loss="kl hidden_states:layers=last")
    with pytest.raises(ConfigError, match="no rows of split train that the loss can learn from"):
        run(store, tmp_path / "x", student=str(student), alpha=0.0, where="teacher_loss IS NULL")
    from predistill.student_train.settings import TrainConfig
    from predistill.student_train.words.students import word_student

    chosen = TrainConfig(stores=["stores/texts"], student="bilstm-cnn", output_dir="x")
    with pytest.raises(ConfigError, match="bilstm-cnn tags words, and stores/texts is for another task"):
        word_student(chosen, type("Sentences", (), {"model_class": "AutoModelForSequenceClassification"})())


# ---- numbers ----


def test_entity_scores() -> None:
    """Counted by hand: two entities, one of them found whole."""
    names = ["O", "B-x", "I-x"]
    truth = torch.tensor([[1, 2, 0, 1, -100], [0, 0, -100, -100, -100]])
    logits = F.one_hot(torch.tensor([[1, 2, 0, 0, 1], [0, 1, 1, 1, 1]]), 3).float()
    found = tag_scores(logits, truth, names)
    assert found == {"accuracy": pytest.approx(4 / 6), "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert set(tag_scores(logits, truth, ["NN", "VB", "I-x"])) == {"accuracy", "macro_f1"}
    assert set(tag_scores(logits, truth, None)) == {"accuracy", "macro_f1"}
    assert tag_scores(logits, torch.full_like(truth, -100), names) == {}
    last = tag_scores(logits, truth, ["O", "B-x", "L-x"])
    assert last["recall"] == last["precision"] == 1, "a B alone is no entity in BILOU"


def test_the_word_tokenizer(tmp_path: Path) -> None:
    made = WordTokenizer.learned([["Film", "film", "a"], ["\u00c9t\u00e9", "a", "a"]], max_characters=4)
    assert made.words == ["a", "film", "\u00e9t\u00e9"] and len(made) == 5
    made.save_pretrained(tmp_path)
    again = WordTokenizer.from_pretrained(tmp_path)
    batch = again([["FILM", "\u00c9t\u00e9", "qqqqqqq", ""], ["a"]])
    assert batch["input_ids"].tolist() == [[3, 4, 1, 1], [2, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["char_ids"].shape == (2, 4, 4) and batch["char_ids"][0, 2].tolist() == [1, 1, 1, 1]
    assert batch["char_ids"][0, 3].tolist() == [1, 0, 0, 0] and not batch["char_ids"][1, 1:].any()
    with pytest.raises(ConfigError, match="the words and characters of a tagger expected"):
        WordTokenizer.from_pretrained(tmp_path / "none")
    (tmp_path / "v.txt").write_text("film 1 2\nFILM 3 4\n")
    ids, vectors = read_vectors(tmp_path / "v.txt", again.word_ids)
    assert ids.tolist() == [3] and vectors.tolist() == [[1, 2]]


def test_a_dataset_of_the_store(store: TeacherStore, student: Path, tmp_path: Path) -> None:
    """Rows that another loader pads give the loss that the store's own do."""
    from predistill import DistillationConfig, DistillationTrainer

    model, losses = AutoModelForTokenClassification.from_pretrained(student), []
    for rows in (store.select("validation", fields=["teacher_logits", "word_ids"]), store.to_dataset("validation")):
        args = DistillationConfig(output_dir=str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, report_to=[])
        losses.append(DistillationTrainer(model=model, args=args, eval_dataset=rows).evaluate())
    assert losses[0]["eval_loss"] == pytest.approx(losses[1]["eval_loss"], rel=1e-5)
    assert losses[0]["eval_teacher_agreement"] == losses[1]["eval_teacher_agreement"]
