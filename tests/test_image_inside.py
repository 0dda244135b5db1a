"""What is inside teachers of images, from a store as with the live teacher beside: feature maps, tokens, attentions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_store import CLASSES, SIDE, convnet, pictures, write_images
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError
from predistill.student_train.dataset import narrowed
from predistill.student_train.inside.objective import InnerObjective
from predistill.student_train.inside.projections import projections_of
from predistill.student_train.losses.terms import Term, parse_loss
from predistill.student_train.tasks import task_of
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

FILES, LABELS = {"train": pictures(6)}, {"train": np.arange(6) % CLASSES}


def vit(seed: int, layers: int, width: int, patch: int = 5) -> ViTForImageClassification:
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIDE, patch_size=patch, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=24, num_labels=CLASSES, initializer_range=0.3, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, attn_implementation="eager",
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def states_of(model, pixels):
    outputs = model(pixel_values=pixels, output_hidden_states=True)
    return {f"teacher_hidden_states_{layer:02d}": value for layer, value in enumerate(outputs.hidden_states)}


@torch.no_grad()
def states_and_attentions_of(model, pixels):
    outputs = model(pixel_values=pixels, output_attentions=True)
    attentions = {f"teacher_attentions_{layer:02d}": value for layer, value in enumerate(outputs.attentions)}
    return {**states_of(model, pixels), **attentions}


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> TeacherStore:
    """Feature maps of 8, 8 and 12 channels."""
    teacher = convnet(3)
    return write_images(tmp_path_factory.mktemp("inside") / "maps", teacher, FILES, LABELS,
                        inside=lambda pixels: states_of(teacher, pixels), said={"layers": 2})  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> TeacherStore:
    """17 tokens, 16 wide, and two heads' attentions, of 3 blocks."""
    teacher = vit(4, 3, 16)
    return write_images(
        tmp_path_factory.mktemp("inside") / "tokens", teacher, FILES, LABELS,
        inside=lambda pixels: states_and_attentions_of(teacher, pixels), said={"layers": 3},
    )  # fmt: skip


def stepped(store, student, *terms):
    """(loss, gradients, batch, projections) of one step over all rows; the student learns nothing else."""
    task = task_of(store)
    objective = InnerObjective(task.objective([]), list(terms), store.fields, seed=0)
    rows = narrowed(store.select(split="train"), [])[[0]]
    objective.attach(student, {"pixel_values": torch.from_numpy(rows["pixel_values"])})
    batch = narrowed(store.select(split="train"), objective.fields)[:]
    batch = {name: torch.from_numpy(np.array(values)) for name, values in batch.items()}
    pixels = {"pixel_values": batch["pixel_values"]}
    made = objective.step(student, pixels, batch, objective.counts(batch))
    made.loss.backward()
    gradients = [None if one.grad is None else one.grad.clone() for one in student.parameters()]
    student.zero_grad()
    return made.loss.detach(), gradients, batch, projections_of(student)


def check_equal(loss, gradients, online, student) -> None:
    online.backward()
    torch.testing.assert_close(loss, online.detach(), rtol=1e-6, atol=0)
    largest = max(one.grad.abs().max() for one in student.parameters() if one.grad is not None)
    for found, parameter in zip(gradients, student.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-6 * float(largest))


def online_maps(student, teacher, pixels, pairs):
    own = student(pixel_values=pixels, output_hidden_states=True).hidden_states
    with torch.no_grad():
        theirs = teacher(pixel_values=pixels, output_hidden_states=True).hidden_states
    return [(own[one], theirs[other]) for one, other in pairs]


def test_feature_maps_are_learnt_through_a_convolution_of_one(maps) -> None:
    """Student of 4 and 6 channels; a projection is FitNets' regressor, a convolution of 1 x 1."""
    student, teacher, pairs = convnet(5, (4, 6)), convnet(3), ((1, 1), (2, 2))
    term = Term("hidden_states", options={"layers": "1:1,2:2", "projection": "auto", "bias": False})
    loss, gradients, batch, projections = stepped(maps, student, term)
    total, count, found = 0, 0, online_maps(student, teacher, batch["pixel_values"], pairs)
    for (own, theirs), (one, other) in zip(found, pairs, strict=True):
        weight = getattr(projections, f"hidden_states/{one}:{other}/weight")
        gap = F.conv2d(own, weight[:, :, None, None]) - theirs
        total, count = total + gap.square().mean(1).sum(), count + gap[:, 0].numel()
    check_equal(loss, gradients, total / count, student)


def test_maps_of_another_size_are_pooled(tmp_path) -> None:
    """A teacher whose last map is 3 x 3, and a student's of 5 x 5."""
    teacher, student = convnet(3), convnet(5, (8,))
    store = write_images(tmp_path / "store", teacher, FILES, LABELS,
                         inside=lambda pixels: states_of(teacher, pixels), said={"layers": 2})  # fmt: skip
    sizes = store.fields["teacher_hidden_states_02"].shape
    term = Term("relations", "attention_transfer", options={"layers": "1:2"})
    loss, gradients, batch, _ = stepped(store, student, term)
    ((own, theirs),) = online_maps(student, teacher, batch["pixel_values"], ((1, 2),))
    assert own.shape[2:] != theirs.shape[2:] and sizes == tuple(theirs.shape[1:])
    own = F.adaptive_avg_pool2d(own, theirs.shape[2:])
    attention = [F.normalize(each.square().mean(1).flatten(1), dim=1) for each in (own, theirs)]
    check_equal(loss, gradients, (attention[0] - attention[1]).square().mean(1).mean(), student)


def test_tokens_and_attentions_of_vision_transformers(tokens) -> None:
    student, teacher = vit(6, 3, 16), vit(4, 3, 16)
    terms = (Term("hidden_states", options={"layers": "0:0,2:3", "projection": "none"}),
             Term("attentions", options={"layers": "last"}))  # fmt: skip
    loss, gradients, batch, _ = stepped(tokens, student, *terms)
    own = student(pixel_values=batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        theirs = teacher(pixel_values=batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    hidden = sum(F.mse_loss(own.hidden_states[one], theirs.hidden_states[other]) for one, other in ((0, 0), (2, 3))) / 2
    check_equal(loss, gradients, hidden + F.mse_loss(own.attentions[2], theirs.attentions[2]), student)


def test_pooled_features_of_a_transformer_teach_a_convolution(tokens) -> None:
    """Similarity of rows, by the mean over positions of each: no widths and no kinds need agree."""
    student, teacher = convnet(5, (4, 6)), vit(4, 3, 16)
    term = Term("relations", "similarity", options={"layers": "2:3", "feature": "mean"})
    loss, gradients, batch, _ = stepped(tokens, student, term)
    own = student(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states[2].mean((2, 3))
    with torch.no_grad():
        theirs = teacher(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states[3].mean(1)
    grams = [F.normalize(each @ each.mT, dim=1) for each in (own, theirs)]
    check_equal(loss, gradients, (grams[0] - grams[1]).square().sum(1).mean() / len(own), student)


class Tower(nn.Module):
    """No model of transformers: two convolutions, which are what is compared."""

    def __init__(self, seed: int, channels: int, step: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.parts = nn.ModuleDict({"low": nn.Conv2d(3, channels, 3, step), "high": nn.Conv2d(channels, 7, 3, 2)})
        self.head = nn.Linear(7, CLASSES)

    def maps(self, pixel_values):
        low = self.parts["low"](pixel_values)
        return low, self.parts["high"](low.relu())

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.head(self.maps(pixel_values)[1].mean((2, 3))))


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> TeacherStore:
    """What --capture parts.low,parts.high keeps of a module."""
    teacher = Tower(1, 10, 2)

    @torch.no_grad()
    def inside(pixels):
        return dict(zip(("teacher_module_parts_low", "teacher_module_parts_high"), teacher.maps(pixels), strict=True))

    return write_images(tmp_path_factory.mktemp("inside") / "modules", teacher, FILES, LABELS, inside=inside)


def test_modules_are_compared_by_name(captured) -> None:
    """Maps of another size and width through a projection; the vectors of means need none."""
    student, teacher = Tower(2, 4, 3), Tower(1, 10, 2)
    terms = (Term("feature_maps", options={"modules": "parts.low:parts.low"}),
             Term("feature_maps", "similarity", options={"modules": "parts.high:parts.high"}))  # fmt: skip
    loss, gradients, batch, projections = stepped(captured, student, *terms)
    low, high = student.maps(batch["pixel_values"])
    with torch.no_grad():
        their_low, their_high = teacher.maps(batch["pixel_values"])
    weight = getattr(projections, "feature_maps/parts_low:parts_low/weight")
    pooled = F.adaptive_avg_pool2d(their_low, low.shape[2:])
    grams = [F.normalize(each.mean((2, 3)) @ each.mean((2, 3)).T, dim=1) for each in (high, their_high)]
    similarity = (grams[0] - grams[1]).square().sum(1).mean() / len(high)
    check_equal(loss, gradients, F.mse_loss(F.conv2d(low, weight[:, :, None, None]), pooled) + similarity, student)


def test_modules_are_named_on_the_command_line() -> None:
    term = parse_loss("feature_maps/similarity:modules=stages.1:layer-3.conv+a:b,weight=0.5")
    assert term == Term("feature_maps", "similarity", 0.5, options={"modules": "stages.1:layer-3.conv+a:b"})
    with pytest.raises(ConfigError, match="similarity modules must be names of modules, student:teacher, as"):
        parse_loss("feature_maps/similarity:modules=layer3")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "compares modules: say which"),
        ({"modules": "parts.low:body"}, "module body is not in the store, which has teacher_module_parts_low"),
        ({"modules": "stem:parts.low"}, "needs the student's module stem, which it does not have"),
    ],
)
def test_modules_that_are_not_there(captured, options, line) -> None:
    with pytest.raises(ConfigError, match=line):
        stepped(captured, Tower(2, 4, 3), Term("feature_maps", options=options))


@pytest.mark.parametrize(
    ("student", "term", "line"),
    [
        (lambda: convnet(5, (4, 6)), Term("hidden_states", options={"layers": "1:1"}),
         "a map of a convolution with tokens"),
        (lambda: vit(6, 2, 16, patch=10), Term("hidden_states", options={"layers": "1:1", "projection": "none"}),
         "must have one shape"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_told_before_training(tokens, student, term, line) -> None:
    with pytest.raises(ConfigError, match=line):
        stepped(tokens, student(), term)
