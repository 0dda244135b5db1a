"""Labels, pseudo-labels, and the names, options and presets by which a run asks for its terms."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from predistill.store.errors import ConfigError
from predistill.student_train import losses
from predistill.student_train.losses import terms
from predistill.student_train.losses.catalogue import (
    INNER,
    LOGIT_LOSSES,
    MULTI_LABEL,
    PROBLEM_TYPES,
    REGRESSION,
    SINGLE_LABEL,
)
from predistill.student_train.losses.presets import PRESETS
from predistill.student_train.losses.rows import LOGIT_FUNCTIONS, row_loss
from predistill.student_train.losses.terms import Term, parse_loss

Pair = tuple[torch.Tensor, torch.Tensor]

ROWS, CLASSES = 5, 4
SINGLE = LOGIT_FUNCTIONS[SINGLE_LABEL]


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def gradient(loss: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), student)[0]


@pytest.fixture
def pair() -> Pair:
    return random_logits(ROWS, CLASSES, seed=1), random_logits(ROWS, CLASSES, seed=2)


# --- labels and pseudo-labels ---


def test_labels_are_cross_entropy_with_missing_rows(pair: Pair) -> None:
    logits = pair[0].clone().requires_grad_()
    labels = torch.tensor([0, -100, 2, 3, -100])
    loss, valid = losses.label_loss(logits, labels)
    assert valid.tolist() == [True, False, True, True, False]
    for row in (0, 2, 3):
        assert loss[row].item() == pytest.approx(-math.log(pair[0][row].softmax(-1)[labels[row]]))
    assert loss[~valid].tolist() == [0.0, 0.0]
    slope = gradient(loss, logits)
    assert slope[~valid].abs().max() == 0 and torch.isfinite(slope).all()


def test_multi_label_entries_may_be_missing(pair: Pair) -> None:
    nan = math.nan
    labels = torch.tensor([[1, 0, nan, 1], [nan] * 4, [0, 0, 0, 0], [1, nan, nan, nan], [1, 1, 1, 1]])
    logits = pair[0].clone().requires_grad_()
    loss, valid = losses.label_loss(logits, labels, MULTI_LABEL)
    assert valid.tolist() == [True, False, True, True, True]
    for row in range(ROWS):
        known = [c for c in range(CLASSES) if not math.isnan(labels[row, c])]
        each = [math.log1p(math.exp(-pair[0][row, c] * (2 * labels[row, c] - 1))) for c in known]
        assert loss[row].item() == pytest.approx(sum(each) / max(len(each), 1), rel=1e-6)
    assert torch.equal(gradient(loss, logits) == 0, labels.isnan())


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_regression_is_squared_error(shape: tuple) -> None:
    logits = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    loss, valid = losses.label_loss(logits, torch.tensor([0.5, math.nan, 5.0]).view(shape), REGRESSION)
    assert loss.tolist() == [0.25, 0.0, 4.0] and valid.tolist() == [True, False, True]
    assert gradient(loss, logits)[:, 0].tolist() == [1.0, 0.0, -4.0]


def test_whole_labels_give_what_transformers_gives(pair: Pair) -> None:
    """The mean over rows is the loss of plain fine-tuning, for each of its three problem types."""
    one, many = torch.tensor([0, 1, 2, 3, 0]), (pair[1] > 0).double()
    mean = losses.label_loss(pair[0], one)[0].mean()
    torch.testing.assert_close(mean, torch.nn.CrossEntropyLoss()(pair[0], one))
    mean = losses.label_loss(pair[0], many, MULTI_LABEL)[0].mean()
    torch.testing.assert_close(mean, torch.nn.BCEWithLogitsLoss()(pair[0], many))
    mean = losses.label_loss(pair[0], pair[1], REGRESSION)[0].mean()
    torch.testing.assert_close(mean, torch.nn.MSELoss()(pair[0], pair[1]))


def test_pseudo_labels_are_the_teachers_confident_predictions_on_unlabelled_rows(pair: Pair) -> None:
    student, teacher = pair
    loss, valid = losses.pseudo_label_loss(student, teacher)
    assert valid.all() and torch.equal(loss, losses.label_loss(student, teacher.argmax(-1))[0])
    confidence = teacher.softmax(-1).amax(-1)
    threshold = confidence.sort().values[2].item()
    labels = torch.tensor([-100, -100, 1, -100, -100])
    kept, valid = losses.pseudo_label_loss(student, teacher, threshold=threshold, labels=labels)
    assert torch.equal(valid, (confidence >= threshold) & (labels == -100))
    assert torch.equal(kept, torch.where(valid, loss, 0.0))


def test_pseudo_labels_of_other_heads(pair: Pair) -> None:
    student, teacher = pair
    labels = torch.full((ROWS, CLASSES), math.nan)
    labels[0] = 1.0
    loss, valid = losses.pseudo_label_loss(student, teacher, MULTI_LABEL, threshold=0.8, labels=labels)
    p = teacher.sigmoid()
    sure = (torch.maximum(p, 1 - p) >= 0.8) & labels.isnan()
    target = torch.where(sure, (p > 0.5).double(), math.nan)
    expected, known = losses.label_loss(student, target, MULTI_LABEL)
    assert torch.equal(valid, known) and not valid[0]
    torch.testing.assert_close(loss, expected)
    loss, _ = losses.pseudo_label_loss(student[:, :1], teacher[:, :1], REGRESSION)
    torch.testing.assert_close(loss, (student - teacher)[:, 0] ** 2)


@pytest.mark.parametrize("function", [losses.label_loss, losses.pseudo_label_loss])
def test_an_unknown_problem_type_is_refused(function: Callable, pair: Pair) -> None:
    with pytest.raises(ValueError, match="multi_label_classification, regression, not 'tagging'"):
        function(*pair, "tagging")


# --- terms ---


def test_row_loss_sends_each_term_to_its_function(pair: Pair) -> None:
    labels = torch.tensor([0, -100, 2, 3, 1])
    for name in LOGIT_LOSSES:
        loss, valid = row_loss(Term("logits", name), *pair, labels, temperature=2.0)
        options = dict(Term("logits", name).options, labels=labels)
        del options["standardize"]
        if name != "dkd":
            del options["labels"]
        assert valid.all() and torch.equal(loss, SINGLE[name](*pair, temperature=2.0, **options))
    warm = row_loss(Term("logits", temperature=4.0), *pair, temperature=2.0)[0]
    assert torch.equal(warm, losses.kl_divergence(*pair, temperature=4.0))
    assert torch.equal(row_loss(Term("labels"), pair[0], None, labels)[1], labels != -100)
    assert torch.equal(row_loss(Term("pseudo_labels"), *pair, labels)[1], labels == -100)
    with pytest.raises(ValueError, match="logits term needs teacher_logits"):
        row_loss(Term("logits"), pair[0])


def test_a_batch_without_labels_gives_zero_on_the_students_graph() -> None:
    student = random_logits(3, 4).requires_grad_()
    loss, valid = row_loss(Term("labels"), student)
    assert loss.tolist() == [0.0] * 3 and not valid.any() and gradient(loss, student).abs().max() == 0


def test_every_named_loss_has_a_function_for_each_of_its_heads() -> None:
    for head in PROBLEM_TYPES:
        named = {name for name, spec in LOGIT_LOSSES.items() if head in spec.heads}
        assert set(LOGIT_FUNCTIONS[head]) == named


def test_parse_loss() -> None:
    assert parse_loss("kl") == Term("logits", "kl")
    warm = Term("logits", "jsd", temperature=2.0, options={"beta": 0.25})
    assert parse_loss("jsd:beta=0.25,temperature=2") == warm
    standard = Term("logits", "reverse_kl", options={"standardize": True})
    assert parse_loss(" reverse-kl : standardize ") == standard
    assert parse_loss("dkd:beta=2,weight=0.5").options == {"alpha": 1.0, "beta": 2.0, "standardize": False}
    assert parse_loss("kl:standardize=false,weight=3").weight == 3.0


@pytest.mark.parametrize(
    "text,says",
    [
        ("klx", "no loss 'klx'; choose from kl, reverse_kl, jsd"),
        ("", "names no loss; choose from kl, reverse_kl"),
        ("jsd:gamma=1", "jsd has no option 'gamma'; its options are beta, standardize"),
        ("jsd:beta=2", "jsd beta must be between 0 and 1, not 2"),
        ("jsd:beta=half", "beta must be a number, not 'half'"),
        ("jsd:beta", "jsd beta must be a number between 0 and 1, not True"),
        ("jsd:beta=nan", "jsd beta must be between 0 and 1, not nan"),
        ("kl:temperature=0", "temperature must be above 0"),
        ("kl:temperature=inf", "temperature must be 0 or more, not inf"),
        ("kl:weight=-1", "weight must be 0 or more, not -1"),
        ("kl:standardize=2", "standardize must be true or false, not '2'"),
        ("jsd:beta=0,beta=1", "beta is given twice"),
    ],
)
def test_parse_loss_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_loss(text)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_terms_are_checked() -> None:
    assert (Term("labels").loss, Term("logits").loss) == ("cross_entropy", "kl")
    assert Term("pseudo_labels").options == {"threshold": 0.0}
    with pytest.raises(ConfigError, match="no term 'hidden'; choose from labels, pseudo_labels, logits"):
        Term("hidden")
    with pytest.raises(ConfigError, match="cross_entropy has no option 'beta'; it has none"):
        Term("labels", options={"beta": 1.0})


@pytest.mark.parametrize(
    "term,head,outputs,says",
    [
        (Term("logits", "dkd"), MULTI_LABEL, 4, "dkd is not defined for a multi"),
        (Term("logits", "jsd"), REGRESSION, 1, "choose from kl, mse"),
        (Term("logits", options={"standardize": True}), SINGLE_LABEL, 2, "3 classes or more"),
        (Term("logits", options={"standardize": True}), REGRESSION, 1, "not regression with 1"),
        (Term("pseudo_labels", options={"threshold": 0.5}), REGRESSION, 1, "threshold needs a confidence"),
        (Term("labels"), "tagging", 4, "no problem type 'tagging'"),
    ],
)
def test_a_term_that_cannot_teach_a_head_is_refused(term: Term, head: str, outputs: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        terms.check_term(term, head, outputs)


def test_terms_that_can() -> None:
    for head, outputs in ((SINGLE_LABEL, 3), (MULTI_LABEL, 5), (REGRESSION, 1)):
        for name in ("labels", "pseudo_labels", "logits"):
            terms.check_term(Term(name), head, outputs)


def test_presets_are_as_published() -> None:
    soft = Term("logits", "kl", weight=0.7, temperature=4.0)
    assert PRESETS["tutorial"]()[0].terms == (Term("labels", weight=1 - 0.7), soft)
    soft = Term("logits", "kl", weight=0.1, temperature=1.0)
    assert PRESETS["nlp-architect"]()[0].terms == (Term("labels"), soft)
    for name in ("tutorial", "nlp-architect"):
        (stage,) = PRESETS[name](temperature=3.0, alpha=0.25)
        assert [term.weight for term in stage.terms] == [0.75, 0.25] and stage.terms[1].temperature == 3.0


@pytest.mark.parametrize(
    "name,names",
    [
        ("haystack", "intermediate prediction"),
        ("tinybert", "intermediate prediction"),
        ("minilm", "relations fine-tuning"),
    ],
)
def test_presets_of_two_stages_learn_inside_first_and_from_answers_after(name: str, names: str) -> None:
    first, last = PRESETS[name]()
    assert f"{first.name} {last.name}" == names
    assert all(term.name in INNER for term in first.terms)
    assert all(term.name in ("labels", "logits") for term in last.terms)


def test_haystack_weighs_both_answers_equally_and_sums_over_layers() -> None:
    first, last = PRESETS["haystack"]()
    assert [(term.name, term.weight) for term in last.terms] == [("labels", 0.5), ("logits", 0.5)]
    assert [term.options["over_layers"] for term in first.terms] == ["sum", "sum"]
    assert first.arguments["num_train_epochs"] == 5 and last.arguments["num_train_epochs"] == 2


def test_what_is_inside_is_asked_for_beside_logits() -> None:
    text = "kl:temperature=3 + hidden_states:layers=0:0,1:3,weight=10 attentions/kl:layers=last,heads=0:1,1:0"
    logits, hidden, attention = terms.parse_losses(text)
    assert (logits.name, logits.temperature) == ("logits", 3.0)
    assert (hidden.loss, hidden.weight, hidden.options["layers"]) == ("mse", 10.0, "0:0,1:3")
    assert (attention.loss, attention.options["layers"], attention.options["heads"]) == ("kl", "last", "0:1,1:0")
    minilm = terms.parse_losses("relations/minilm:relation_heads=12,pairs=qk+vv")[0]
    assert (minilm.options["relation_heads"], minilm.options["pairs"]) == (12, "qk+vv")


@pytest.mark.parametrize(
    "text,says",
    [
        ("hiden_states", "nlp_architect_mse, hidden_states, embeddings, attentions, attention_scores, relations"),
        ("hidden_states/huber", "no hidden_states loss 'huber'; choose from mse, cosine, pkd"),
        ("hidden_states:layers=first", "choose from uniform, last, tutorial, every-2 and the like, or 0:0,1:2"),
        ("hidden_states:temperature=2", "temperature is for logits"),
        ("relations/minilm:relation_heads=a", "relation_heads must be a whole number from 0, not 'a'"),
        ("kl:layers=last", "kl has no option 'layers'"),
    ],
)
def test_what_is_inside_is_asked_for_wrongly(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        terms.parse_losses(text)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_mixture_leaves_out_what_weighs_nothing() -> None:
    assert terms.mixture(0.0, Term("logits")) == (Term("labels"),)
    assert terms.mixture(1.0, Term("logits", "mse")) == (Term("logits", "mse"),)
    with pytest.raises(ConfigError, match="alpha must be between 0 and 1, not 1.5"):
        terms.mixture(1.5, Term("logits"))


def test_terms_are_read_without_torch() -> None:
    code = "import sys, predistill.student_train.losses.terms; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there() -> None:
    assert all(getattr(losses, name) is not None for name in losses.__all__)
    with pytest.raises(AttributeError, match="no attribute 'hinton'"):
        _ = losses.hinton
