"""What recording does to a model, to gradients and to other threads; models in wrappers, and of any kind."""

import threading

import pytest
import torch
import transformers
from activation_cases import IDS, INPUTS, TINY, build, eager
from predistill.store.activations import Sites
from predistill.store.errors import ConfigError
from torch import nn


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_finding_leaves_the_model_as_it_was(name):
    model = build(name).train()
    model.base_model.eval()
    training = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    for attention in (None, "queries-keys", "eager"):
        sites = Sites.find(model, INPUTS["right"], attention=attention)
    assert torch.equal(torch.get_rng_state(), state)
    with sites.recording({"hidden_states": (1,), "attentions": (0,)}):
        model(**INPUTS["right"])
    assert [module.training for module in model.modules()] == training
    assert not any(hook.__module__.startswith("predistill") for hook in _hooks(model))


def _hooks(model):
    for module in model.modules():
        yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def test_hooks_and_attention_go_when_the_forward_pass_raises():
    model = build("Bert")
    sites = Sites.find(model, INPUTS["right"], attention="queries-keys")
    with pytest.raises(IndexError), sites.recording({"attentions": (1,), "hidden_states": (1,)}):
        model(input_ids=IDS + 1000)
    assert model.config._attn_implementation == "sdpa"
    assert not any(hook.__module__.startswith("predistill") for hook in _hooks(model))


def test_only_what_is_wanted_is_kept():
    model = build("Bert")
    sites = Sites.find(model, INPUTS["right"], attention="queries-keys")
    with torch.no_grad(), sites.recording({"hidden_states": (1,), "values": (2,)}) as found:
        assert (
            sum(hook.__module__.startswith("predistill") for hook in _hooks(model)) == 3
        )  # the model's two, one layer's
        model(**INPUTS["right"])
    assert set(found) == {("hidden_states", 1), ("values", 2)}


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [(name, checkpointing) for name in ("Bert", "Gemma2", "GptOss") for checkpointing in (False, True)]
    + [("Albert", False)],
)
def test_gradients_of_a_student_in_training(name, checkpointing):
    """Those of the same loss of what eager attention and output_hidden_states give."""

    def gradients(model, loss):
        model.zero_grad()
        loss.backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    model, inputs = build(name), INPUTS["right"]
    model.set_attn_implementation("eager")
    valid = inputs["attention_mask"].bool()
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    weights = outputs.attentions[1].masked_fill(~valid[:, None, :, None], 0)
    expected = gradients(model, weights.square().sum() + outputs.hidden_states[2].square().sum())
    sites = Sites.find(model, inputs, attention="queries-keys")
    if checkpointing:  # in training only, which is to be without dropout here
        model.config.use_cache = False
        _no_dropout(model.train())
        _checkpoint(model, use_reentrant=False)
    with sites.recording({"hidden_states": (2,), "attentions": (1,)}) as found:
        model(**inputs)
        loss = found["attentions", 1].square().sum() + found["hidden_states", 2].square().sum()
        made = gradients(model, loss)  # recomputes inside the block, and records nothing
        assert set(found) == {("hidden_states", 2), ("attentions", 1)}
    assert made.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for parameter, gradient in expected.items():
        torch.testing.assert_close(made[parameter], gradient, rtol=0, atol=2e-6 * largest, msg=parameter)


def _checkpoint(model, **settings):
    """By the name that this version of transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)


def _no_dropout(model):
    for module in model.modules():
        for name in ("p", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def test_checkpointing_that_loses_gradients_is_refused():
    model = build("Bert").train()
    sites = Sites.find(model, INPUTS["right"], attention="queries-keys")
    _checkpoint(model, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(ConfigError, match="'use_reentrant': False"), sites.recording({"queries": (0,)}):
        model(**INPUTS["right"])


def test_other_threads_and_parts_of_the_model_are_not_recorded():
    model = build("Bert")
    sites = Sites.find(model, INPUTS["right"], attention="queries-keys")
    with torch.no_grad(), sites.recording({"hidden_states": (1,), "attentions": (0,)}) as found:
        thread = threading.Thread(target=lambda: model(input_ids=IDS[:1]))
        thread.start()
        thread.join()
        assert not found
        model(**INPUTS["right"])
        model.base_model(input_ids=IDS[:1])
        assert found["hidden_states", 1].shape[0] == found["attentions", 0].shape[0] == 3
    with (
        pytest.raises(ConfigError, match="hidden_states 1 of .* did not come"),
        sites.recording({"hidden_states": (1,)}),
    ):
        model.base_model(**INPUTS["right"])


def test_half_precision_and_autocast():
    model, inputs = build("Llama"), INPUTS["right"]
    _, expected = eager(model, inputs)
    sites = Sites.find(model, inputs, attention="queries-keys")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), sites.recording({"attentions": (0,)}) as found:
        model(**inputs)
    assert found["attentions", 0].dtype == torch.float32
    valid = inputs["attention_mask"].bool()[:, None, :, None]
    torch.testing.assert_close(found["attentions", 0], expected[0].masked_fill(~valid, 0), rtol=0, atol=0.05)
    model.bfloat16()
    sites = Sites.find(model, inputs, attention="queries-keys")
    with torch.inference_mode(), sites.recording({"queries": (0,), "attentions": (0,)}) as found:
        model(**inputs)
    assert found["queries", 0].dtype == torch.bfloat16 and found["attentions", 0].dtype == torch.float32


def test_two_recordings_at_once():
    """A teacher that a student of the same kind is trained beside."""
    student, teacher = build("Bert"), build("Bert")
    nn.init.zeros_(teacher.bert.embeddings.word_embeddings.weight)
    of = [Sites.find(model, INPUTS["right"], attention="queries-keys") for model in (student, teacher)]
    with of[0].recording({"attentions": (0,)}) as own, of[1].recording({"attentions": (0,)}) as other, torch.no_grad():
        student(**INPUTS["right"])
        teacher(**INPUTS["right"])
    for model, found in ((student, own), (teacher, other)):
        expected = eager(model, INPUTS["right"])[1][0]
        torch.testing.assert_close(found["attentions", 0][0], expected[0], rtol=0, atol=2e-6)
        assert model.config._attn_implementation == "sdpa"


class _Wrapped(nn.Module):
    """What torch.compile leaves of a model."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, **inputs):
        return self._orig_mod(**inputs)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_wrapped_models():
    peft = pytest.importorskip("peft")
    model = build("Bert")
    states, attentions = eager(model, INPUTS["right"])
    adapted = peft.get_peft_model(build("Bert"), peft.LoraConfig(target_modules=["query"], r=2))
    for wrapped in (_Wrapped(model), adapted):
        sites = Sites.find(wrapped, INPUTS["right"], attention="queries-keys")
        with torch.no_grad(), sites.recording({"hidden_states": (2,), "attentions": (0,)}) as found:
            wrapped(**INPUTS["right"])
        assert torch.equal(found["hidden_states", 2], states[2])
        torch.testing.assert_close(found["attentions", 0][0], attentions[0][0], rtol=0, atol=2e-6)


def test_pooled():
    config = transformers.BertConfig(**TINY)
    model = transformers.BertForSequenceClassification(config).eval()
    sites = Sites.find(model, INPUTS["right"])
    with torch.no_grad(), sites.recording({"pooled": (0,)}) as found:
        model(**INPUTS["right"])
    assert torch.equal(found["pooled", 0], model.bert(**INPUTS["right"]).pooler_output)
    assert sites.shapes["pooled", 0] == (32,)
    with pytest.raises(ConfigError, match="has no pooled 0; it has none"):
        Sites.find(build("Llama"), INPUTS["right"]).recording({"pooled": (0,)}).__enter__()


def test_modules_of_any_model():
    model = nn.Sequential()
    model.add_module("first", nn.Conv2d(3, 4, 3))
    model.add_module("stage", nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU()))
    images = torch.randn(2, 3, 8, 8)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.again = model, nn.ReLU()

        def forward(self, x):
            return self.again(self.again(self.body(x)))

    net = Net()
    sites = Sites.find(net, {"x": images})
    assert sites.depth == 0 and set(sites.names) == {"body", "body.first", "body.stage", "body.stage.0", "body.stage.1"}
    assert sites.shapes["module", "body.stage"] == (5, 4, 4)
    with sites.recording({}, modules=("body.first", "body.stage")) as found:
        net(images)
    assert torch.equal(found["module", "body.first"], model.first(images))
    assert torch.equal(found["module", "body.stage"], model(images))
    for asked, message in (
        ("again", "no module 'again' that runs once"),
        ("layer3", "it has body.first, body.stage.0"),
    ):
        with pytest.raises(ConfigError, match=message), sites.recording({}, modules=(asked,)):
            pass
    with (
        pytest.raises(ConfigError, match="Net has no hidden_states 0; it has none"),
        sites.recording({"hidden_states": (0,)}),
    ):
        pass


def test_layers_that_there_are_not():
    sites = Sites.find(build("Bert"), INPUTS["right"], attention="queries-keys")
    for wanted, message in (
        ({"hidden_states": (4,)}, "has no hidden_states 4; it has 0 to 3"),
        ({"queries": (3,)}, "has no queries 3; it has 0 to 2"),
    ):
        with pytest.raises(ConfigError, match=message), sites.recording(wanted):
            pass
    plain = Sites.find(build("Bert"), INPUTS["right"])
    with pytest.raises(ConfigError, match="attention='queries-keys'"), plain.recording({"attentions": (0,)}):
        pass


@pytest.mark.parametrize("mask", [torch.arange(300) < 200, torch.arange(300) > 200])
def test_a_long_batch_is_cut(mask):
    model, seen = build("Llama"), []
    ids = torch.randint(5, 99, (16, 300))
    inputs = {"input_ids": ids, "attention_mask": mask.expand(16, -1).long(), "labels": ids}
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    Sites.find(model, inputs, attention="queries-keys")
    assert all(seen[0][name].shape == (2, 32) for name in inputs)
    assert 0 < int(seen[0]["attention_mask"][0].sum()) < 32


def test_compiled_models_are_recorded_as_written():
    model = build("Bert")
    states, _ = eager(model, INPUTS["right"])
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**INPUTS["right"])
        sites = Sites.find(compiled, INPUTS["right"], attention="queries-keys")
        with sites.recording({"hidden_states": (1,), "attentions": (0,)}) as found:
            compiled(**INPUTS["right"])
    assert torch.equal(found["hidden_states", 1], states[1])
    model.base_model.compile(backend="eager")
    with torch.no_grad():
        model(**INPUTS["right"])
        with sites.recording({"hidden_states": (1,), "attentions": (0,)}) as found:
            model(**INPUTS["right"])
    assert torch.equal(found["hidden_states", 1], states[1])
