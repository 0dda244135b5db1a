"""The store's README.md: a dataset card, so that who finds the folder knows what it is and how to read it."""

from __future__ import annotations

from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ..store import Plan

_HUB_TASKS = {
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "causal-lm": "text-generation",
    "image-classification": "image-classification",
    "semantic-segmentation": "image-segmentation",
}
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

What a teacher says of every row of a dataset, kept so that students can be trained without running it again.
Made by predistill; the layout is described in its `store/FORMAT.md`.

| | |
|---|---|
| task | {{ plan.task }} |
| teacher | {{ teacher_name }}, {{ weights }}) |{%- for kind in ("tokenizer", "processor") if kind in plan.identity %}
| {{ kind }} | `{{ plan.identity[kind].name }}` (sha256 {{ plan.identity[kind].sha256[:12] }}) |
{%- endfor %}
| dataset | `{{ dataset.name }}` ({{ revision }}rows sha256 {{ dataset.rows_sha256[:12] }}) |
| samples | {{ samples }} |
{%- if plan.label_names %}
| classes | {{ plan.label_names | join(", ") }} |
{%- endif %}
| fingerprint | `{{ plan.fingerprint }}` |

The licences of the teacher and of the dataset hold for what was made from them.

## Splits

| split | samples | tokens | shards | bytes |
|---|---|---|---|---|
{%- for split in splits %}
| {{ split.name }} | {{ split.samples }} | {{ split.tokens }} | {{ split.shards }} | {{ split.bytes }} |
{%- endfor %}

## Fields

`S` is the number of tokens of a row. Logits are unnormalised scores, at temperature 1.

| column | shape of a row | dtype | codec | role |
|---|---|---|---|---|
{%- for spec in plan.fields %}
| `{{ spec.name }}` | {{ spec.shape | join(" × ") or "1" }} | {{ spec.dtype }} | {{ spec.codec }} | {{ spec.role }} |
{%- endfor %}
{%- if layered %}

Of columns that end in a number, `teacher_hidden_states_00` are the embeddings and `_NN` what comes after block NN; all
others count blocks from `_00`. `H × S × S` is [head, query, key]. Their parameters stand in `store.json`.
{%- endif %}

`index.duckdb` and `samples.parquet` hold one row a sample: its address, length, label, and the columns of role summary.

## Reading it

With predistill, decoded and padded:

```python
from predistill import TeacherStore

rows = TeacherStore.open(".").select(split="{{ splits[0].name }}", where="teacher_confidence < 0.9")
batch = rows[[0, 1]] if len(rows) > 1 else None
```

With pyarrow, memory-mapped:

```python
import pyarrow as pa

table = pa.ipc.open_file(pa.memory_map("shards/{{ first_shard }}.arrow")).read_all()
```

With datasets:

```python
from datasets import load_dataset

samples = load_dataset("parquet", data_files="samples.parquet", split="train")
```

With DuckDB:

```python
import duckdb

duckdb.sql("SELECT split, count(*), avg(teacher_entropy) FROM 'samples.parquet' GROUP BY split").show()
```
"""


def dataset_card(plan: Plan, committed: dict[str, dict[str, int]], name: str) -> str:
    """Markdown with a YAML head. committed: shard name -> {"rows", "tokens", "bytes"}."""
    splits: dict[str, dict[str, Any]] = {}
    for shard in plan.shards:
        fresh = {"name": shard.split, "samples": 0, "tokens": 0, "shards": 0, "bytes": 0}
        entry, split = committed[shard.name], splits.setdefault(shard.split, fresh)
        split["shards"] += 1
        for total, part in (("samples", "rows"), ("tokens", "tokens"), ("bytes", "bytes")):
            split[total] += entry[part]
    samples = sum(split["samples"] for split in splits.values())
    head = DatasetCardData(
        pretty_name=name,
        tags=["predistill", "knowledge-distillation"],
        task_categories=[_HUB_TASKS[plan.task]] if plan.task in _HUB_TASKS else None,
        size_categories=[_size(samples)],
        configs=[{"config_name": "default", "data_files": "samples.parquet"}],
    )
    teacher, dataset = plan.identity["teacher"], plan.identity["dataset"]
    sha256, revision = teacher.get("weights_sha256") or teacher.get("state_sha256"), dataset["revision"]
    given = f"`{teacher['class']}` (given in Python"
    named = f"`{teacher['name']}` ({teacher['class']}" if "name" in teacher else given
    card = DatasetCard.from_template(
        head, template_str=_TEMPLATE, plan=plan, name=name, teacher_name=named, dataset=dataset, samples=samples,
        weights=f"weights sha256 {sha256[:12]}" if sha256 else f"commit {teacher['commit']}",
        revision=f"revision {revision}, " if revision else "", splits=list(splits.values()),
        first_shard=plan.shards[0].name, layered=any("layers" in spec.parameters for spec in plan.fields),
    )  # fmt: skip
    return str(card)


def _size(samples: int) -> str:
    """The Hub's words for how many rows there are."""
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((word for bound, word in bounds if samples < bound), "10M<n<100M")
