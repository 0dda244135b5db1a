"""Projections: parameters of the student while it is trained, and nothing of what is saved of it."""

from __future__ import annotations

import copy

import pytest
import torch
from predistill.store.errors import ConfigError, StoreMismatch
from predistill.student_train.inside.projections import (
    LinearMap,
    Projections,
    attach_projections,
    projections_of,
)
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

KEY = "hidden_states/1:3"


def student() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, num_labels=2,
        )
    )  # fmt: skip


def test_a_map_is_that_of_a_linear_layer():
    projections, linear = Projections({KEY: LinearMap(8, 12, bias=True)}), nn.Linear(8, 12)
    with torch.no_grad():
        linear.weight.copy_(dict(projections.named_parameters())[f"{KEY}/weight"])
        linear.bias.copy_(dict(projections.named_parameters())[f"{KEY}/bias"])
    hidden = torch.randn(2, 5, 8)
    assert torch.equal(projections(KEY, hidden), linear(hidden))
    assert projections(KEY, hidden.bfloat16()).dtype == torch.float32
    assert KEY in projections and "hidden_states/1:2" not in projections


def test_initial_weights_follow_the_seed_and_leave_the_generator_alone():
    maps = {KEY: LinearMap(64, 100, bias=True), "hidden_states/0:0": LinearMap(64, 100)}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (dict(Projections(maps, seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.keys() == {f"{KEY}/weight", f"{KEY}/bias", "hidden_states/0:0/weight"}
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one)
    reference = nn.Linear(64, 100)
    assert one[f"{KEY}/weight"].std().item() == pytest.approx(reference.weight.std().item(), rel=0.1)
    assert one[f"{KEY}/weight"].abs().max() <= 1 / 8


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 12), (12, 8)])
def test_orthogonal_initialisation(inputs, outputs):
    weight = dict(Projections({KEY: LinearMap(inputs, outputs, orthogonal=True)}).named_parameters())[f"{KEY}/weight"]
    gram = weight.T @ weight if outputs > inputs else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(8), atol=1e-6, rtol=0)


def test_attached_they_are_parameters_and_not_in_what_is_saved(tmp_path):
    model, plain = student(), student()
    attach_projections(model, Projections({KEY: LinearMap(8, 12, bias=True)}))
    names = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert names == {f"distillation_projections.{KEY}/weight", f"distillation_projections.{KEY}/bias"}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.load_state_dict(plain.state_dict(), strict=True)
    model.save_pretrained(tmp_path)
    loaded, report = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), "neither missing nor unexpected keys"
    assert loaded.state_dict().keys() == plain.state_dict().keys() and projections_of(loaded) is None
    assert projections_of(copy.deepcopy(model)) is not projections_of(model)
    second = Projections({KEY: LinearMap(8, 12)})
    attach_projections(model, second)
    assert projections_of(model) is second
    attach_projections(model, None)
    assert projections_of(model) is None and len(list(model.parameters())) == len(list(plain.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checkpoint_brings_them_back_bit_for_bit(tmp_path, dtype):
    maps = {KEY: LinearMap(8, 12, bias=True), "embeddings/0:0": LinearMap(8, 12)}
    saved = Projections(maps, seed=1, dtype=dtype)
    saved.save(tmp_path / "checkpoint" / "projections.safetensors")
    found = Projections(maps, seed=2, dtype=dtype)
    found.load(tmp_path / "checkpoint" / "projections.safetensors")
    for (name, left), (other, right) in zip(saved.named_parameters(), found.named_parameters(), strict=True):
        assert name == other and torch.equal(left, right) and right.requires_grad and right.dtype == dtype


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "projections.safetensors"
    with pytest.raises(ConfigError, match="is not there: this run learns projections"):
        Projections({KEY: LinearMap(8, 12)}).load(path)
    Projections({KEY: LinearMap(8, 12)}).save(path)
    with pytest.raises(StoreMismatch, match=r"1:3/weight has shape \[12, 8\], this run's has \[16, 8\]"):
        Projections({KEY: LinearMap(8, 16)}).load(path)
    with pytest.raises(StoreMismatch, match=r"1:3/bias has shape None, this run's has \[12\]"):
        Projections({KEY: LinearMap(8, 12, bias=True)}).load(path)
    path.write_bytes(b"no tensors at all")
    with pytest.raises(ConfigError, match="cannot be read"):
        Projections({KEY: LinearMap(8, 12)}).load(path)
