"""Students that read words: a new one with the vocabulary of the train split, or a saved one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...store.errors import ConfigError
from ...store.reader import TeacherStore
from ...store.schema import TOKENS
from ..bilstm_cnn import BILSTM_CNN, BiLstmCnnConfig, BiLstmCnnForTokenClassification
from ..progress import say
from ..settings import TrainConfig
from ..tasks import Task
from .rows import CHUNK
from .vocabulary import WordTokenizer, read_vectors

_OF_VOCABULARY = ("model_type", "vocab_size", "num_characters")  # settings that no --student-config decides


def word_student(config: TrainConfig, task: Task) -> tuple[BiLstmCnnForTokenClassification, WordTokenizer]:
    """Raises ConfigError, DataError where the task is not about words, or the student cannot be."""
    if task.model_class != "AutoModelForTokenClassification":
        raise ConfigError(f"{BILSTM_CNN} tags words, and {config.stores[0]} is for another task: give another student")
    if config.student in (None, BILSTM_CNN):
        return new(config, task)
    if config.student_vectors is not None:
        raise ConfigError(f"--student-vectors {config.student_vectors}: {config.student} has vectors; leave it away")
    settings = BiLstmCnnConfig.from_pretrained(config.student)
    task.check_config(str(config.student), settings)
    for name in ("id2label", "label2id"):
        setattr(settings, name, task.settings[name])
    model = BiLstmCnnForTokenClassification.from_pretrained(config.student, config=settings, dtype=torch.float32)
    return model, WordTokenizer.from_pretrained(str(config.student))


def new(config: TrainConfig, task: Task) -> tuple[BiLstmCnnForTokenClassification, WordTokenizer]:
    """Random weights; those of words that have a pretrained vector aside."""
    given = _given(config)
    letters = given.get("max_characters", BiLstmCnnConfig().max_characters)
    tokenizer = WordTokenizer.learned(_words(config), letters)
    vectors = None
    if config.student_vectors is not None:
        ids, vectors = read_vectors(config.student_vectors, tokenizer.word_ids)
        if given.setdefault("word_embedding_size", vectors.shape[1]) != vectors.shape[1]:
            raise ConfigError(
                f"--student-vectors {config.student_vectors} has vectors of {vectors.shape[1]} numbers, and "
                f"word_embedding_size is {given['word_embedding_size']}: leave that away"
            )
        say(f"note: {len(ids)} of {len(tokenizer.words)} words have a vector in {config.student_vectors}")
    sizes = {"vocab_size": len(tokenizer), "num_characters": tokenizer.num_characters}
    try:
        model = BiLstmCnnForTokenClassification(BiLstmCnnConfig(**{**given, **task.settings, **sizes}))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"--student-config {config.student_config}: {str(error).splitlines()[0]}") from None
    if vectors is not None:
        with torch.no_grad():
            model.words.weight[torch.from_numpy(ids)] = torch.from_numpy(vectors)
    return model, tokenizer


def _given(config: TrainConfig) -> dict[str, Any]:
    """Settings of --student-config. Raises ConfigError for names that no bilstm-cnn has."""
    if config.student_config is None:
        return {}
    place = Path(config.student_config).expanduser()
    found = json.loads((place / "config.json" if place.is_dir() else place).read_text(encoding="utf-8"))
    given = {name: value for name, value in found.items() if name not in _OF_VOCABULARY}
    known = [name for name in vars(BiLstmCnnConfig()) if not name.startswith("_")]
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(f"--student-config {place}: {BILSTM_CNN} has no {unknown[0]}")
    return given


def _words(config: TrainConfig) -> Iterator[list[str]]:
    """Of the train split of every store, a row at a time."""
    for path in config.stores:
        with TeacherStore.open(path) as store:
            rows = store.select(split=config.train_split, fields=[TOKENS])
            for start in range(0, len(rows), CHUNK):
                yield from rows[start : start + CHUNK][TOKENS]
