"""A batch a few rows at a time: every token that counts is in one piece, and losses are what they are of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inner_cases import ROWS, bert, gap, objective_of, stepped, write_inside
from predistill.student_train.collator import DataCollatorForDistillation
from predistill.student_train.inside import objective as inner
from predistill.student_train.inside.pieces import WHOLE, Piece, Pieces
from predistill.student_train.losses.terms import Term

SPANS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)).map(sorted), min_size=1, max_size=12)


def masks(spans: list[list[int]]) -> torch.Tensor:
    """bool [B, 8], True from the first to before the second; a row of nothing has none."""
    places = torch.arange(8)
    return torch.stack([(places >= first) & (places < end) for first, end in spans])


@given(spans=SPANS, most=st.integers(0, 200), power=st.sampled_from([1, 2]))
def test_every_token_is_in_one_piece(spans: list[list[int]], most: int, power: int) -> None:
    mask = masks(spans)
    seen, count = torch.zeros(mask.shape, dtype=torch.int64), torch.zeros(len(mask), dtype=torch.int64)
    for piece in Pieces(mask, len(mask), mask.device).of(lambda tokens: 3 * tokens**power, most):
        cut = piece.of(mask, (1,))
        piece.add(seen, cut.long(), (1,))
        piece.add(count, torch.ones(len(cut), dtype=torch.int64), ())
        assert len(cut) * 3 * cut.shape[1] ** power <= most or len(cut) == 1 or _unlike(spans, cut)
    assert torch.equal(seen, mask.long()) and (count == 1).all()


def _unlike(spans: list[list[int]], cut: torch.Tensor) -> bool:
    """Are rows padded on different sides? Then a piece spans more than its longest row."""
    return bool(cut.shape[1] > int(cut.sum(1).max()))


def test_a_batch_that_fits_is_whole() -> None:
    mask = masks([[0, 8], [0, 2]])
    assert list(Pieces(mask, 2, mask.device).of(lambda tokens: tokens, 16)) == [WHOLE]
    assert list(Pieces(mask, 2, mask.device).of(lambda tokens: 0, 0)) == [WHOLE], "rows that are compared"
    found = Pieces(mask, 2, mask.device).of(lambda tokens: tokens, 15)
    assert [(_rows(piece), piece.tokens) for piece in found] == [([0], (0, 8)), ([1], (0, 2))]


def _rows(piece: Piece) -> list[int]:
    assert piece.rows is not None
    return piece.rows.tolist()


def test_images_have_no_tokens_to_leave_out() -> None:
    found = list(Pieces(None, 5, torch.device("cpu")).of(lambda tokens: 49, 100))
    assert [_rows(piece) for piece in found] == [[0, 1], [2, 3], [4]]
    assert found[0].of(torch.arange(30).view(5, 6), (1,)).tolist() == torch.arange(12).view(2, 6).tolist()


TERMS = [
    Term("hidden_states"), Term("attentions"), Term("attention_scores", weight=0.1),
    Term("relations", "minilm", options={"relation_heads": 8, "layers": "last"}),
]  # fmt: skip


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_losses_and_gradients_are_those_of_the_whole(tmp_path, monkeypatch, dtype, side):
    """Of columns that are cut as they are stored, padded on either side."""
    store = write_inside(tmp_path / "store", bert(7, 4, 24, 4).eval(), {"train": ROWS}, dtype=dtype)
    found = []
    for most in (1, 500, 1 << 30):
        monkeypatch.setattr(inner, "PIECE", (most, most))
        student = bert(0, 2, 16, 4)
        objective = objective_of(store, student, TERMS)
        rows = store.select("train").with_fields(objective.fields, stored=objective.stored_fields)
        batch = DataCollatorForDistillation()(rows[:])
        if side == "left":
            batch = {name: _turned(value, batch["attention_mask"]) for name, value in batch.items()}
        found.append(stepped(objective, student, batch))
    for loss, gradients in found[:2]:
        assert loss == pytest.approx(found[2][0], rel=1e-6) and gap(gradients, found[2][1]) < 1e-6


def _turned(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each row's padding before it."""
    length, axes = mask.shape[1], [axis for axis, size in enumerate(value.shape) if axis and size == mask.shape[1]]
    if not axes:
        return value
    rows = [
        row.roll([length - int(own)] * len(axes), [axis - 1 for axis in axes])
        for row, own in zip(value, mask.sum(1), strict=True)
    ]
    return torch.stack(rows)


def test_the_gradient_is_handed_on_once():
    """It is scaled where it lies."""
    from predistill.student_train.inside.gradients import Learnt

    weight = torch.ones(3, requires_grad=True)
    found = {("hidden_states", 0): weight * 2}
    learnt = Learnt(found, [])
    leaves = learnt.leaves(WHOLE)
    learnt.learn(leaves["hidden_states", 0].sum(), leaves)
    loss = learnt.total(torch.tensor(6.0))
    (3 * loss).backward(retain_graph=True)
    assert weight.grad is not None and weight.grad.tolist() == [6.0] * 3
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
