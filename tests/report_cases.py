"""Small stores with summaries and carried columns, runs as `train` leaves them, and a page read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from predistill.store import FieldSpec, Plan, ShardPlan, StoreWriter

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
ACTIVE = {"script", "iframe", "object", "embed", "base", "link", "form", "foreignobject", "animate", "set"}


class Page(HTMLParser):
    """A page read back: raises AssertionError where its tags do not nest. `tables` is {caption: rows of cells}."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.captions: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag == "table":
            self.tables[" ".join(self._caption.split())] = self._rows

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if "caption" in self.open:
            self._caption += data
        elif self._rows and self._rows[-1] and ("td" in self.open or "th" in self.open):
            self._rows[-1][-1] += data

    def column(self, caption: str, name: str) -> dict[str, str]:
        """{first cell of a row: its cell of column `name`}."""
        head, *rows = self.tables[caption]
        return {row[0]: row[head.index(name)] for row in rows}


def check_safe(text: str) -> Page:
    """Nothing on the page is fetched or runs; every id is there once, every figure and image has words, and every cell
    of a head its scope."""
    page = Page(text)
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))
    for tag, values in page.tags:
        assert tag not in ACTIVE, tag
        for name, value in values.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
                assert value and value.startswith(("#", "data:image/png;", "data:image/jpeg;")), f"{tag} {name}={value}"
                assert not value.startswith("#") or value[1:] in ids, value
            if name != "content":
                assert "url(" not in (value or "").replace("url(#", ""), f"{tag} {name}={value}"
        if tag == "svg":
            assert values.get("role") == "img" and values.get("aria-label")
        if tag == "img":
            assert values.get("alt")
        if tag == "th":
            assert values.get("scope") in ("row", "col")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert text.count("<style>") == 1 and text.startswith("<!DOCTYPE html>")
    return page


# ---- stores ----


def samples(rows: int, classes: int = 3, seed: int = 0, unlabelled: int = 0) -> dict[str, np.ndarray]:
    """What a teacher says of `rows` rows, and their labels, the last `unlabelled` of which are missing."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, classes)) * 2
    labels = np.where(generator.random(rows) < 0.6, logits.argmax(1), generator.integers(0, classes, rows))
    labels[rows - unlabelled :] = -100
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    probs = np.exp(logprobs)
    loss = -logprobs[np.arange(rows), np.maximum(labels, 0)]
    return {
        "labels": labels.astype(np.int64), "teacher_prediction": logits.argmax(1),
        "teacher_confidence": probs.max(1).astype(np.float32),
        "teacher_entropy": -(probs * logprobs).sum(1).astype(np.float32),
        "teacher_loss": np.where(labels < 0, np.nan, loss).astype(np.float32),
    }  # fmt: skip


def write_store(
    path: Path,
    splits: Mapping[str, Mapping[str, np.ndarray]],
    *,
    carried: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    images: Mapping[str, Sequence[bytes]] | None = None,
    label_names: Any = None,
    identity: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    only: int | None = None,
    shard_rows: int = 50,
) -> Path:
    """splits: {name: columns as `samples` gives them}; carried: {column: {split: texts}}; only: shards to commit."""
    columns = list(next(iter(splits.values())))
    kinds = {"labels": ("int64", "label"), "teacher_prediction": ("int64", "summary")}
    described = {name: kinds.get(name, ("float32", "summary")) for name in columns}
    fields = [FieldSpec(name, (), dtype, role=role) for name, (dtype, role) in described.items()]
    fields += [FieldSpec(name, (), "string", codec="arrow", role="carried") for name in carried or {}]
    fields += [FieldSpec("image", (), "binary", codec="bytes", role="input")] if images else []
    shards = [
        ShardPlan(split, number, start, min(start + shard_rows, len(values[columns[0]])))
        for split, values in splits.items()
        for number, start in enumerate(range(0, max(len(values[columns[0]]), 1), shard_rows))
    ]
    plan = Plan("text-classification", dict(settings or {}), dict(identity or {}), fields, shards, label_names)
    with StoreWriter.begin(path, plan) as writer:
        for shard in writer.missing()[:only]:
            mine = slice(shard.start, shard.stop)
            rows = shard.stop - shard.start
            builder = writer.open_shard(shard, rows, {})
            for name in columns if rows else ():
                builder.put(name, np.arange(rows), splits[shard.split][name][mine])
            for name, texts in (carried or {}).items():
                builder.put_column(name, pa.array(list(texts[shard.split][mine]), pa.string()))
            if images:
                builder.put_column("image", pa.array(list(images[shard.split][mine]), pa.large_binary()))
            builder.put_addresses(np.arange(rows * 16, dtype=np.uint32).astype(np.uint8).reshape(rows, 16))
            writer.commit(builder)
        if only is None:
            writer.finish()
    return path


# ---- runs ----


def write_run(
    path: Path, terms: Sequence[str], metrics: Mapping[str, float] | None, seed: int = 1, **more: Any
) -> Path:  # fmt: skip
    """A folder as `train` leaves it; metrics without their `eval_`, None for a run that has not ended."""
    path.mkdir(parents=True)
    made = {
        "stores": [{"fingerprint": more.pop("fingerprint", "f" * 64), "task": "text-classification", "split": "train"}],
        "student": {"source": more.pop("student", "tiny.json"), "retokenized": False},
        "terms": [{"name": name, "loss": "kl", "weight": 1.0, "temperature": 2.0, "options": {}} for name in terms],
        "rows": more.pop("rows", 100),
        "training_arguments": {"seed": seed, "learning_rate": 1e-3, "hub_token": "hf_secret"},
        "settings": {"temperature": 2.0, "alpha": 0.5, "eval_split": None, **more},
    }
    (path / "predistill.json").write_text(json.dumps(made), encoding="utf-8")
    if metrics is None:
        return path
    found = {f"eval_{name}": value for name, value in metrics.items()}
    (path / "metrics.json").write_text(
        json.dumps({**found, "eval_runtime": 3.5, "student_parameters": 1234, "train_runtime": 9.0, "epoch": 2.0})
    )
    history = [{"step": 10, "loss": 0.9}, {"step": 10, **{name: value / 2 for name, value in found.items()}},
               {"step": 20, "loss": 0.4}, {"step": 20, **found}]  # fmt: skip
    (path / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 20}))
    return path
