"""What is inside tiny teachers: stores of it, written through StoreWriter from their own forward pass, and students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classification_store import random_rows
from predistill.store import FieldSpec, Plan, ShardPlan, StoreWriter, TeacherStore, content_hash
from predistill.store.activations import Sites
from predistill.student_train.inside.objective import InnerObjective
from predistill.student_train.tasks import task_of
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY = 60
ROWS = random_rows(12, 1, VOCABULARY)
INPUTS = ("input_ids", "attention_mask")
LAYERED = ("hidden_states", "attentions", "attention_scores", "queries", "keys", "values")


def bert(seed: int, layers: int, width: int, heads: int, dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=32, max_position_embeddings=32, num_labels=3, initializer_range=0.3,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


@torch.no_grad()
def inside(teacher: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Columns of all layers: hidden states and attentions as the model returns them, the others as Sites records."""
    teacher.eval()
    sites = Sites.find(teacher, inputs, attention="queries-keys")
    depth = range(sites.depth)
    with sites.recording({kind: tuple(depth) for kind in LAYERED[2:]}) as found:
        teacher(**inputs)
    made = {f"teacher_{kind}_{layer:02d}": value for (kind, layer), value in found.items()}
    before = teacher.config._attn_implementation
    teacher.set_attn_implementation("eager")
    outputs = teacher(**inputs, output_hidden_states=True, output_attentions=True)
    teacher.set_attn_implementation(before)
    for kind in LAYERED[:2]:
        made |= {f"teacher_{kind}_{layer:02d}": value for layer, value in enumerate(outputs[kind])}
    if hasattr(teacher, "bert"):
        made["teacher_pooled"] = teacher.bert(**inputs).pooler_output
    mask = inputs["attention_mask"].bool()
    for name, value in made.items():  # a store keeps rows without their padding
        if "_attentions_" in name:
            made[name] = value * (mask[:, None, :, None] & mask[:, None, None, :])
    settings = {layer: one.to_json() for layer, one in sites.attention.items()}
    return {"teacher_logits": outputs.logits, **made, "settings": settings}  # type: ignore[dict-item]


def specs_of(columns: Mapping[str, torch.Tensor], dtype: str, depth: int) -> list[FieldSpec]:
    """Of the columns that `inside` gives."""
    made = []
    settings: Any = columns["settings"]
    for name, value in columns.items():
        if name == "settings":
            continue
        sizes: Any = tuple(value.shape[1:])
        if name == "teacher_logits":
            made.append(FieldSpec(name, sizes if len(sizes) == 1 else ("S", *sizes[1:]), "float32"))
            continue
        if name == "teacher_pooled":
            made.append(FieldSpec(name, sizes, dtype if dtype != "int8" else "float32"))
            continue
        square = "_attention" in name
        shape = (sizes[0], "S", "S") if square else ("S", *sizes[1:])
        parameters = {"layers": depth}
        if square or "_queries_" in name:
            parameters["attention"] = settings[int(name[-2:])]
        codec, kind = ("int8", "float32") if dtype == "int8" else ("dense", dtype)
        made.append(FieldSpec(name, shape, kind, codec=codec, parameters=parameters))
    return made


def write_inside(
    path: Path, teacher: Any, splits: Mapping[str, Sequence[Sequence[int]]], *, keep: Sequence[str] = ("",),
    dtype: str = "float32", labels: bool = True, task: str = "text-classification",
) -> TeacherStore:  # fmt: skip
    """keep: parts of column names, such as "hidden_states" or "queries_01"; logits are always kept."""
    found = {split: inside(teacher, padded(rows)) for split, rows in splits.items()}
    depth = teacher.config.num_hidden_layers
    fields = [
        spec for spec in specs_of(next(iter(found.values())), dtype, depth)
        if spec.name == "teacher_logits" or any(part in spec.name for part in keep)
    ]  # fmt: skip
    given = [FieldSpec("input_ids", ("S",), "int32", role="input", pad=0)]
    if labels:
        given.append(
            FieldSpec("labels", () if task == "text-classification" else ("S",), "int64", role="label", pad=-100)
        )
    shards = [ShardPlan(split, 0, 0, len(rows)) for split, rows in splits.items()]
    with StoreWriter.begin(path, Plan(task, {}, {}, [*given, *fields], shards)) as writer:
        for shard in writer.missing():
            write_shard(writer, shard, splits[shard.split], found[shard.split], fields, given)
        writer.finish()
    return TeacherStore.open(path)


def write_shard(writer: Any, shard: Any, rows: Any, found: Any, fields: Any, given: Any) -> None:
    every = np.arange(len(rows))
    builder = writer.open_shard(shard, len(rows), {"S": np.array([len(row) for row in rows], np.int64)})
    builder.put("input_ids", every, padded(rows)["input_ids"].numpy())
    if len(given) > 1:
        per_row = np.arange(len(rows)) % found["teacher_logits"].shape[-1]
        builder.put("labels", every, padded(rows)["input_ids"].numpy() if given[1].shape else per_row)
    for spec in fields:
        builder.put(spec.name, every, found[spec.name].float().numpy())
    builder.put_addresses(np.stack([np.frombuffer(content_hash([str(list(row))]), np.uint8) for row in rows]))
    writer.commit(builder)


def objective_of(store, student, terms, outer=()):
    made = InnerObjective(task_of(store).objective(list(outer)), terms, store.fields)
    made.attach(student, padded(ROWS[:2]))
    return made


def batch_of(store, objective, rows=slice(None)):
    read = store.select("train").with_fields(objective.evaluation_fields)[rows]
    return {name: torch.as_tensor(value) for name, value in read.items()}


def stepped(objective, student, batch, counts=None):
    """(loss, gradients by name) of one micro-batch."""
    student.zero_grad()
    inputs = {name: batch[name] for name in INPUTS}
    step = objective.step(student, inputs, batch, objective.counts(batch) if counts is None else counts)
    step.loss.backward()
    gradients = {name: one.grad.clone() for name, one in student.named_parameters() if one.grad is not None}
    return step.loss.item(), gradients


def gap(left, right):
    largest = max(float(value.abs().max()) for value in right.values())
    return max(float((left[name] - right[name]).abs().max()) for name in right) / largest
