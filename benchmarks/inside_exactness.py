"""Is learning from stored hidden states and attentions the same mathematics as learning from the teacher beside it?

Relative differences, smaller is better, of each loss of the inside and of its gradient for all of the student's weights
and projections (norm of the difference over norm), the largest of some batches of SST-2: columns read from a store of
each dtype, against the same term on what the teacher gives for the very same batch. Hidden states, attentions (eager)
and the pooled output are those that transformers returns; scores, queries, keys and values those that its attention
was called with. Loss functions are the same on both sides, so that what differs is what was stored; that they are right
is what tests compare with plain formulas and with recorded values of the originals.

`kept`: exact columns, or queries and keys, of which attention is made anew. What is left in a float32 store is the
teacher's own rounding: the dump ran it in batches of other sizes. Student: inside_results.py's, random weights, dropout
off, float32; layer maps are the losses' own defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from predistill.benchmarks.inside_step import inside_store, student
from predistill.benchmarks.measure import note, options, quiet, table
from predistill.benchmarks.real import teacher
from predistill.store import FieldSpec, TeacherStore
from predistill.store.activations import Sites
from predistill.store.schema import layer_column
from predistill.student_train.collator import DataCollatorForDistillation
from predistill.student_train.inside.objective import InnerObjective
from predistill.student_train.losses.catalogue import INNER_LOSSES
from predistill.student_train.losses.terms import Term
from predistill.student_train.tasks import task_of
from transformers import AutoModelForSequenceClassification

ROWS, BATCH = 512, 32  # rows of the stores, rows a batch
DTYPES = ("float32", "float16", "bfloat16", "int8")
STORES = {  # fields and --attention-storage
    "exact": (["hidden_states", "attentions", "pooled"], "exact"),
    "exact scores": (["attention_scores"], "exact"),
    "queries-keys": (["attentions", "values"], "queries-keys"),
}
QUICK = ("hidden_states/mse", "hidden_states/cosine", "embeddings/mse", "attentions/mse", "attention_scores/mse",
         "relations/minilm")  # fmt: skip
HIDDEN, ATTENTION = (0, 2, 4, 6), (1, 3, 5)  # columns of inside_results.LAYERS
Batch = Mapping[str, torch.Tensor]


def stores_of(term: Term) -> tuple[str, ...]:
    """Names of STORES that a term can be computed from."""
    if term.name in ("attentions", "attention_scores"):
        return ("exact" if term.name == "attentions" else "exact scores", "queries-keys")
    return ("queries-keys",) if term.loss == "minilm" else ("exact",)


def open_store(kept: str, dtype: str) -> TeacherStore:
    fields, storage = STORES[kept]
    return TeacherStore.open(inside_store(f"exactness-{kept.replace(' ', '-')}", fields, storage, dtype, ROWS))


class Live:
    """A teacher in memory: the columns that a float32 store of exact fields has, for one batch."""

    def __init__(self, inputs: Batch) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(
            teacher("sst2"), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.sites = Sites.find(self.model, inputs, attention="queries-keys")

    @torch.no_grad()
    def __call__(self, inputs: Batch) -> dict[str, torch.Tensor]:
        kinds = ("attention_scores", "queries", "keys", "values")
        with self.sites.recording(dict.fromkeys(kinds, ATTENTION)) as found:
            self.model(**inputs)
        columns = {layer_column(kind, int(layer)): value for (kind, layer), value in found.items()}
        outputs = self.model(**inputs, output_hidden_states=True, output_attentions=True)
        columns |= {layer_column("hidden_states", layer): outputs.hidden_states[layer] for layer in HIDDEN}
        columns |= {layer_column("attentions", layer): outputs.attentions[layer] for layer in ATTENTION}
        return {**columns, "teacher_pooled": self.model.bert(**inputs).pooler_output}


def inputs_of(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def loss_and_gradient(
    term: Term, store: TeacherStore, fields: Mapping[str, FieldSpec], pupil: Any, batch: Batch
) -> tuple[float, torch.Tensor]:
    """The term on columns of `batch`. fields: of the columns; store: for the task alone."""
    objective = InnerObjective(task_of(store).objective([]), [term], fields)
    objective.attach(pupil, inputs_of(batch))
    pupil.zero_grad(set_to_none=True)
    loss = objective.step(pupil, inputs_of(batch), batch, objective.counts(batch)).loss
    loss.backward()
    weights = [one.grad.flatten().double() for one in pupil.parameters() if one.grad is not None]
    return loss.item(), torch.cat(weights)


def read(term: Term, store: TeacherStore, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """A batch as training reads it: columns that a loss decodes come as they are stored."""
    objective = InnerObjective(task_of(store).objective([]), [term], store.fields)
    selected = store.select(split="train").with_fields(objective.fields, objective.stored_fields)
    return DataCollatorForDistillation()(selected[rows])


def measure(terms: list[Term], batches: int) -> list[list[object]]:
    """One row a term and a way of keeping what it reads: loss and gradient of each dtype."""
    opened = {(kept, dtype): open_store(kept, dtype) for kept in STORES for dtype in DTYPES}
    exact = {name: spec for kept in STORES for name, spec in opened[kept, "float32"].fields.items()}
    first = opened["exact", "float32"]
    pupil = student("narrow").eval()
    live, worst = None, dict[tuple[str, str, str], list[float]]()
    for chosen in np.random.default_rng(0).choice(ROWS, (batches, BATCH), replace=False):
        plain = DataCollatorForDistillation()(first.select(split="train", fields=[])[chosen])
        live = live or Live(inputs_of(plain))
        online = {**plain, **live(inputs_of(plain))}
        for term in terms:
            name = f"{term.name}/{term.loss}"
            loss, gradient = loss_and_gradient(term, first, exact, pupil, online)
            for kept in stores_of(term):
                for dtype in DTYPES:
                    store = opened[kept, dtype]
                    batch = read(term, store, chosen)
                    found, other = loss_and_gradient(term, store, store.fields, pupil, batch)
                    gap = [abs(found / loss - 1), ((other - gradient).norm() / gradient.norm()).item()]
                    before = worst.get((name, kept, dtype), [0.0, 0.0])
                    worst[name, kept, dtype] = [max(pair) for pair in zip(before, gap, strict=True)]
    ways = dict.fromkeys((name, kept) for name, kept, _ in worst)
    return [
        [name, kept.split()[0], *(f"{value:.1e}" for dtype in DTYPES for value in worst[name, kept, dtype])]
        for name, kept in ways
    ]


def main() -> None:
    args = options(__doc__).parse_args()
    every = [Term(family, loss) for family, losses in INNER_LOSSES.items() for loss in losses]
    terms = [term for term in every if not args.quick or f"{term.name}/{term.loss}" in QUICK]
    note("inside_exactness: stores of 4 dtypes, 3 ways")
    with quiet():
        found = measure(terms, 1 if args.quick else 3)
    heads = [f"{dtype} {what}" for dtype in DTYPES for what in ("loss", "gradient")]
    heads[:2] = ["float32 loss (reach 1e-6)", "float32 gradient (the same)"]
    table(["term", "kept", *heads], found)


if __name__ == "__main__":
    main()
