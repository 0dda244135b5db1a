"""README.md of a merged store."""

from __future__ import annotations

from collections.abc import Sequence

from ..manifest import Plan
from ..reader import TeacherStore

_PAGE = """# {name}

What a teacher says of every row of a dataset, kept so that students can be trained without running it again.
Made by predistill; the layout is described in its `store/FORMAT.md`.

Merged of {count} stores: more {kind}. `store.json` says under `plan.identity.merged_from` what each was.

| | |
|---|---|
| task | {task} |
| fingerprint | `{fingerprint}` |

The licences of the teacher and of the datasets hold for what was made from them.

## Stores

| fingerprint | sha256 of its store.json | rows | fields |
|---|---|---|---|
{stores}

## Fields

| column | shape of a row | dtype | codec | role |
|---|---|---|---|---|
{fields}
"""


def card(name: str, plan: Plan, stores: Sequence[TeacherStore], kind: str) -> str:
    """Markdown. Nothing of the stores' own names and texts is in it, which a stranger may have written."""
    rows = "\n".join(
        f"| `{store.fingerprint[:12]}` | `{store.manifest['sha256'][:12]}` | {int(store.first_row[-1])} | "
        f"{len(store.fields)} |" for store in stores
    )  # fmt: skip
    fields = "\n".join(
        f"| `{spec.name}` | {' × '.join(map(str, spec.shape)) or '1'} | {spec.dtype} | {spec.codec} | {spec.role} |"
        for spec in plan.fields
    )
    return _PAGE.format(name=name, count=len(stores), kind=kind, task=plan.task, fingerprint=plan.fingerprint,
                        stores=rows, fields=fields)  # fmt: skip
