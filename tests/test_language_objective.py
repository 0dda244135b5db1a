"""Language models: what is stored at each token against a teacher that runs in the test, whatever the store keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from language_store import MISSING, random_rows, write_store
from predistill.store.errors import ConfigError
from predistill.student_train.collator import DataCollatorForDistillation
from predistill.student_train.language import losses as token_losses
from predistill.student_train.language.objective import LanguageObjective, positions
from predistill.student_train.losses.terms import Term
from predistill.student_train.settings import DistillationSettings
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 40


def llama(seed: int, vocabulary: int = VOCABULARY, tied: bool = False, layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def teacher():
    return llama(7, layers=2)


def logits_by(model):
    @torch.no_grad()
    def logits(ids):
        return model(input_ids=torch.tensor([ids])).logits[0]

    return logits


def objective_and_batch(path, teacher, rows, loss="kl", temperature=1.0, alpha=0.7, **stored):
    store = write_store(path, {"train": rows}, logits_by(teacher), **stored)
    terms = DistillationSettings(loss=loss, temperature=temperature, alpha=alpha).terms()
    objective = LanguageObjective(terms, store.fields)
    chosen = store.select("train", fields=objective.evaluation_fields)
    return objective, DataCollatorForDistillation()(chosen[list(range(len(rows)))])


def step(objective, student, batch, dtype=None):
    student.zero_grad()
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    found = objective.step(student, inputs, batch, objective.counts(batch))
    found.loss.backward()
    return found, {name: one.grad.clone() for name, one in student.named_parameters() if one.grad is not None}


def classes(logprobs, kept, tail="bucket"):
    """log-probabilities [N, K + 1] of the kept ids and of all others, from exact ones [N, V]."""
    rest = logprobs.scatter(-1, kept, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, kept), rest], -1)


def online(student, teacher, rows, divergence, temperature, alpha):
    """Row by row, the teacher beside the student. divergence(z_student, z_teacher) at [N, V] -> [N], without T^2."""
    hard, soft = [], []
    for ids, labels in rows:
        z = student(input_ids=torch.tensor([ids])).logits[0]
        with torch.no_grad():
            wanted = teacher(input_ids=torch.tensor([ids])).logits[0]
        following = torch.tensor([*labels[1:], MISSING])
        known = following != MISSING
        hard.append(F.cross_entropy(z[known], following[known], reduction="none"))
        soft.append(divergence(z[known] / temperature, wanted[known] / temperature) * temperature**2)
    hard, soft = torch.cat(hard), torch.cat(soft)
    return alpha * soft.mean() + (1 - alpha) * hard.mean(), (hard.mean(), soft.mean())


def gap(left, right):
    largest = max(float(value.abs().max()) for value in right.values())
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in right) / largest


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def bucketed(k, distance):
    def divergence(z, wanted):
        kept = wanted.topk(k).indices
        return distance(classes(wanted.log_softmax(-1), kept), classes(z.log_softmax(-1), kept))

    return divergence


DISTANCES = {
    "kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "total_variation": lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2,
    "jsd:beta=0.3": lambda p, q: 0.3 * kl(p, m := (0.3 * p.exp() + 0.7 * q.exp()).log()) + 0.7 * kl(q, m),
}


@pytest.mark.parametrize("loss", DISTANCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tied", [False, True])
def test_top_k_offline_equals_online(teacher, tmp_path, loss, temperature, tied):
    """The K kept ids and all others in one class, on both sides; the teacher's log-sum-exp is stored at T."""
    rows, student = random_rows(9, 1, prompt=True), llama(0, tied=tied)
    objective, batch = objective_and_batch(tmp_path / "s", teacher, rows, loss, temperature, temperatures=[2.0])
    found, gradients = step(objective, student, batch)
    student.zero_grad()
    expected, (hard, soft) = online(student, teacher, rows, bucketed(5, DISTANCES[loss]), temperature, 0.7)
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    counts = objective.counts(batch)
    assert (found.sums / counts).tolist() == pytest.approx([hard.item(), soft.item()], rel=1e-6)
    assert gap(gradients, {name: one.grad for name, one in student.named_parameters()}) < 1e-6


@pytest.mark.parametrize("kind", ["dense", "top-k"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_logits_give_the_dense_divergence(teacher, tmp_path, kind, dtype):
    rows, student = random_rows(6, 2), gpt2(0)
    stored = {"kind": kind, "k": VOCABULARY, "dtype": dtype}
    objective, batch = objective_and_batch(tmp_path / "s", teacher, rows, temperature=3.0, **stored)
    found, gradients = step(objective, student, batch)
    student.zero_grad()
    expected, _ = online(student, teacher, rows, lambda z, y: kl(y.log_softmax(-1), z.log_softmax(-1)), 3.0, 0.7)
    expected.backward()
    bound = {"float32": 1e-6, "float16": 2e-3}[dtype]
    assert found.loss.item() == pytest.approx(expected.item(), rel=bound)
    assert gap(gradients, {name: one.grad for name, one in student.named_parameters()}) < bound


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
def test_what_is_not_kept(teacher, tmp_path, tail):
    rows, student = random_rows(6, 3), llama(0)
    objective, batch = objective_and_batch(tmp_path / "s", teacher, rows, f"kl:tail={tail}", 2.0, temperatures=[2])
    found, _ = step(objective, student, batch)

    def divergence(z, wanted):
        kept = wanted.topk(5).indices
        p, q = wanted.log_softmax(-1), z.log_softmax(-1)
        if tail == "bucket":
            return kl(classes(p, kept), classes(q, kept))
        p, q = p.gather(-1, kept), q.gather(-1, kept)
        return kl(p.log_softmax(-1) if tail == "renormalize" else p, q)

    expected, _ = online(student, teacher, rows, divergence, 2.0, 0.7)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_as_many_as_their_mass_asks_for(teacher, tmp_path):
    rows, student = random_rows(6, 3), llama(0)
    objective, batch = objective_and_batch(tmp_path / "s", teacher, rows, k=20, top_p=0.8)
    found, _ = step(objective, student, batch)

    def divergence(z, wanted):
        p, q, each = wanted.log_softmax(-1), z.log_softmax(-1), []
        for one, other in zip(p, q, strict=True):
            ranked = one.sort(descending=True)
            count = min(int((ranked.values.exp().cumsum(0) < 0.8).sum()) + 1, 20)
            kept = ranked.indices[None, :count]
            each.append(kl(classes(one[None], kept), classes(other[None], kept)))
        return torch.cat(each)

    assert batch["teacher_top_k_counts"].unique().numel() > 2
    expected, _ = online(student, teacher, rows, divergence, 1.0, 0.7)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_the_log_sum_exp_at_the_temperature_it_is_estimated(teacher, tmp_path, caplog):
    rows, student, found = random_rows(6, 3), llama(0), []
    for stored in ([], [2]):
        path = tmp_path / str(stored)
        objective, batch = objective_and_batch(path, teacher, rows, "kl", 2.0, k=20, temperatures=stored)
        found.append(step(objective, student, batch)[0].sums[1].item())
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=0.2)
    assert caplog.text.count("no teacher_logsumexp_at_2") == 1 and "estimated" in caplog.text


def test_samples(teacher, tmp_path):
    """-sum w log q over the draws, and their own entropy, as the weights say."""
    rows, student = random_rows(6, 3), llama(0)
    objective, batch = objective_and_batch(tmp_path / "s", teacher, rows, kind="sampled", alpha=1.0)
    found, _ = step(objective, student, batch)
    total = 0.0
    logprobs = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    for row, (ids, _) in enumerate(rows):
        for at in range(len(ids) - 1):
            counts = batch["teacher_sample_counts"][row, at]
            drawn = batch["teacher_sample_indices"][row, at][counts > 0]
            w = counts[counts > 0] / 12
            assert int(counts.sum()) == 12
            total += (w * (w.log() - logprobs[row, at, drawn])).sum().item()
    assert found.sums.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["top-k", "sampled", "dense"])
def test_fields_stored_where_they_are_used(teacher, tmp_path, kind):
    rows, student = random_rows(7, 4, prompt=True), llama(0)
    everywhere = objective_and_batch(tmp_path / "all", teacher, rows, kind=kind)
    some = objective_and_batch(tmp_path / "some", teacher, rows, kind=kind, completion=True)
    assert "teacher_mask" in some[1] and "teacher_mask" not in everywhere[1]
    assert positions(some[1]).taught.all()
    if kind == "sampled":  # the draws differ
        assert torch.equal(everywhere[0].counts(everywhere[1]), some[0].counts(some[1]))
        return
    whole, part = (step(objective, student, batch) for objective, batch in (everywhere, some))
    assert part[0].loss.item() == pytest.approx(whole[0].loss.item(), rel=1e-6)
    assert gap(part[1], whole[1]) < 1e-6


def test_labels_where_the_teacher_is_not_stored(teacher, tmp_path):
    """The labels' term speaks of every label, the teacher's of the positions that it has."""
    rows, student = random_rows(7, 4, prompt=True), llama(0)
    objective, batch = objective_and_batch(tmp_path / "s", teacher, rows, completion=True)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], MISSING)
    every, taught = objective.counts(batch).tolist()
    assert every == sum(len(ids) - 1 for ids, _ in rows) > taught == int(batch["teacher_mask"].sum())
    found, _ = step(objective, student, batch)
    _, (hard, _) = online(student, teacher, [(ids, ids) for ids, _ in rows], lambda z, y: z.sum(-1), 1.0, 0.5)
    _, (_, soft) = online(student, teacher, rows, bucketed(5, kl), 1.0, 0.5)
    assert found.loss.item() == pytest.approx(0.3 * hard.item() + 0.7 * soft.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["top-k", "dense"])
def test_documents_packed_into_a_row_are_as_if_apart(teacher, tmp_path, kind):
    apart, student = random_rows(6, 5), llama(0)
    together, places = [], []
    for first, second in zip(apart[::2], apart[1::2], strict=True):
        labels = [MISSING, *first[0][1:], MISSING, *second[0][1:]]
        together.append(([*first[0], *second[0]], labels))
        places.append([*range(len(first[0])), *range(len(second[0]))])

    @torch.no_grad()
    def whole(ids):
        row = next(at for at, (known, _) in enumerate(together) if known is ids)
        return torch.cat([logits_by(teacher)(one) for one, _ in apart[2 * row : 2 * row + 2]])

    single = objective_and_batch(tmp_path / "apart", teacher, apart, kind=kind)
    store = write_store(tmp_path / "packed", {"train": together}, whole, kind=kind, position_ids={"train": places})
    rows = store.select("train", fields=single[0].fields)
    batch = DataCollatorForDistillation()(rows[[0, 1, 2]])
    expected, found = (step(single[0], student, one) for one in (single[1], batch))
    assert found[0].loss.item() == pytest.approx(expected[0].loss.item(), rel=1e-6)
    assert gap(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize(("loss", "kind"), [("kl", "top-k"), ("jsd", "top-k"), ("kl", "sampled"), ("kl", "dense")])
def test_a_head_that_cannot_be_had_alone_gives_the_same_numbers(teacher, tmp_path, monkeypatch, caplog, loss, kind):
    rows, student = random_rows(6, 6), llama(0)
    objective, batch = objective_and_batch(tmp_path / "s", teacher, rows, loss, kind=kind)
    fused = step(objective, student, batch), evaluated(objective, student, batch)
    monkeypatch.setattr(token_losses, "split_head", lambda *_: None)
    objective.student = token_losses.StudentTokens()
    whole = step(objective, student, batch), evaluated(objective, student, batch)
    assert "cannot be had alone" in caplog.text
    assert whole[0][0].loss.item() == pytest.approx(fused[0][0].loss.item(), rel=1e-6)
    assert whole[0][0].outputs.logits.shape == (6, batch["labels"].shape[1], VOCABULARY)
    assert fused[0][0].outputs.logits.shape[:2] != batch["labels"].shape
    assert gap(whole[0][1], fused[0][1]) < 1e-6
    assert whole[1] == pytest.approx(fused[1], rel=1e-6)


@torch.no_grad()
def evaluated(objective, student, batch, rows=None):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = objective.evaluate(student, inputs, batch, len(batch["labels"]) if rows is None else rows)
    assert found.logits is None
    return objective.scores(found.totals)


def test_evaluation(teacher, tmp_path):
    rows, student = random_rows(6, 6, prompt=True), llama(0)
    objective, batch = objective_and_batch(tmp_path / "s", teacher, rows, temperature=2.0, temperatures=[2])
    scores = evaluated(objective, student, batch, rows=4)
    expected, (hard, soft) = online(student, teacher, rows[:4], bucketed(5, kl), 2.0, 0.7)
    right, agreed = [], []
    for ids, labels in rows[:4]:
        student_says, teacher_says = (logits_by(model)(ids).argmax(-1)[:-1] for model in (student, teacher))
        following = torch.tensor(labels[1:])
        right.append((student_says == following)[following != MISSING])
        agreed.append((student_says == teacher_says)[following != MISSING])
    assert scores == pytest.approx(
        {
            "loss": expected.item(), "loss_labels": hard.item(), "loss_logits": soft.item(),
            "perplexity": hard.exp().item(), "token_accuracy": torch.cat(right).double().mean().item(),
            "teacher_agreement": torch.cat(agreed).double().mean().item(),
        }, rel=1e-6,
    )  # fmt: skip


def test_evaluation_tells_the_labels_loss_always_and_the_teachers_where_it_is_stored(teacher, tmp_path):
    rows, student = random_rows(6, 6), llama(0)
    objective, batch = objective_and_batch(tmp_path / "s", teacher, rows, alpha=1.0)
    assert objective.names == ["logits"]
    assert {"loss_labels", "loss_logits", "loss"} <= evaluated(objective, student, batch).keys()
    plain = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
    assert evaluated(objective, student, plain).keys() == {"loss_labels", "perplexity", "token_accuracy"}
    stored = dict.fromkeys(["teacher_top_k_indices", "teacher_top_k_logits"])
    labels_only = LanguageObjective(DistillationSettings(alpha=0).terms(), stored)
    assert labels_only.fields == [] and labels_only.evaluation_fields == ["teacher_top_k_indices"]
    scores = evaluated(labels_only, student, batch)
    assert scores["loss"] == scores["loss_labels"] and "teacher_agreement" in scores and "loss_logits" not in scores


@pytest.mark.parametrize("size", [37, 64])
@pytest.mark.parametrize("kind", ["top-k", "dense", "sampled"])
def test_vocabularies_padded_to_other_sizes(teacher, tmp_path, size, kind):
    """Ids stop at 36: a student of 37 lacks only the teacher's padding, which the teacher gives no probability."""

    def padded(ids):
        logits = logits_by(teacher)(ids)
        logits[:, 37:] = -60
        return logits

    rows, student = random_rows(5, 8, vocabulary=37), llama(0, vocabulary=size)
    store = write_store(tmp_path / "s", {"train": rows}, padded, kind=kind)
    objective = LanguageObjective(DistillationSettings(temperature=1.0).terms(), store.fields)
    batch = DataCollatorForDistillation()(store.select("train")[list(range(5))])
    found, _ = step(objective, student, batch)
    scores = evaluated(objective, student, batch)
    assert torch.isfinite(found.loss) and ("teacher_agreement" in scores) == (kind != "sampled")
    if kind == "sampled":
        return
    k = 5 if kind == "top-k" else 37
    soft = []
    for ids, _ in rows:
        z, wanted = logits_by(student)(ids)[:-1], padded(ids)[:-1]
        q, p, kept = z.log_softmax(-1), wanted.log_softmax(-1), wanted.topk(k).indices
        rest = p.exp().scatter(-1, kept, 0).sum(-1)
        others = q.exp().scatter(-1, kept, 0).sum(-1)
        inside = kl(p.gather(-1, kept), q.gather(-1, kept))
        soft.append(inside + (rest * (rest / others).log() if k == 5 else 0))
    assert found.sums[1].item() == pytest.approx(torch.cat(soft).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("sampled", {"temperature": 2.0}, "samples at temperature 1; got --temperature 2"),
        ("sampled", {"loss": "reverse_kl"}, "--loss kl or soft_cross_entropy can be computed, not reverse_kl"),
        ("top-k", {"loss": "dkd"}, "loss dkd needs every logit of the teacher"),
        ("top-k", {"loss": "kl:standardize"}, "standardize needs every logit"),
        ("dense", {"loss": "kl:tail=ignore"}, "tail=ignore is for truncated logits"),
    ],
)
def test_losses_that_the_stored_fields_cannot_give(teacher, tmp_path, kind, more, message):
    with pytest.raises(ConfigError, match=message):
        objective_and_batch(tmp_path / "s", teacher, random_rows(3), kind=kind, **more)


def test_clear_refusals():
    with pytest.raises(ConfigError, match="every token of a text has its label"):
        LanguageObjective([Term("pseudo_labels")], {"teacher_logits": None})
    with pytest.raises(ConfigError, match="no teacher's logits, but input_ids, labels"):
        LanguageObjective([Term("logits")], dict.fromkeys(["input_ids", "labels"]))
    objective = LanguageObjective([Term("logits")], {"teacher_logits": None})
    batch = {"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2, 3).long()}
    with pytest.raises(ConfigError, match="'logits' needs teacher_logits, which these rows do not have"):
        objective.counts(batch)
    with pytest.raises(ConfigError, match="need labels"):
        objective.counts({"input_ids": batch["input_ids"], "teacher_logits": torch.ones(2, 3, 4)})
