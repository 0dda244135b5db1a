"""Inner outputs that are recorded are those that transformers returns, architecture by architecture."""

import pytest
import torch
import transformers
from activation_cases import ALL, CASES, DECODER, ENCODERS, INPUTS, build, eager
from predistill.store.activations import Sites
from predistill.store.attention import attention_probabilities, attention_scores, visible_keys
from predistill.store.errors import ConfigError


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_probabilities_of_queries_and_keys_are_those_of_eager_attention(name, padding):
    model, inputs = build(name), INPUTS[padding]
    own = model.config._attn_implementation
    sites = Sites.find(model, inputs, attention="queries-keys")
    states, attentions = eager(model, inputs)
    layers = range(sites.depth)
    assert sites.depth == len(attentions) == len(sites.attention)
    with (
        torch.no_grad(),
        sites.recording(
            {"hidden_states": range(len(states)), "attentions": layers, "queries": layers, "keys": layers}
        ) as found,
    ):
        model(**inputs)
    assert model.config._attn_implementation == own
    mask = inputs.get("attention_mask", torch.ones(attentions[0].shape[0], attentions[0].shape[-1])).bool()
    for layer in layers:
        settings = sites.attention[layer]
        visible = visible_keys(mask, settings, inputs.get("position_ids"))
        scores = attention_scores(found["queries", layer], found["keys", layer], settings)
        expected = attentions[layer].masked_fill(~mask[:, None, :, None], 0)
        for made in (found["attentions", layer], attention_probabilities(scores, visible, settings.sinks)):
            torch.testing.assert_close(made, expected, rtol=0, atol=2e-6)
        assert found["queries", layer].shape[2:] == sites.shapes["queries", layer]
        assert found["keys", layer].shape[2:] == sites.shapes["keys", layer]
    for layer, state in enumerate(states):
        assert torch.equal(found["hidden_states", layer], state)
        assert state.shape[2:] == sites.shapes["hidden_states", layer]


@pytest.mark.parametrize("name", ALL)
def test_hidden_states_in_training_are_those_that_the_model_returns(name):
    model, inputs = build(name), INPUTS["image" if name == "ViT" else "right"]
    sites = Sites.find(model, inputs)
    model.train()
    torch.manual_seed(1)
    expected = model(**inputs, output_hidden_states=True)
    torch.manual_seed(1)
    with sites.recording({"hidden_states": range(sites.depth + 1)}) as found:
        outputs = model(**inputs)
    assert torch.equal(outputs.logits, expected.logits)
    for layer, state in enumerate(expected.hidden_states):
        assert torch.equal(found["hidden_states", layer], state) and found["hidden_states", layer].requires_grad


@pytest.mark.parametrize("name", ["Bert", "Albert", "Llama", "GptOss", "DebertaV2", "ViT"])
def test_eager_attentions(name):
    model, inputs = build(name), INPUTS["image" if name == "ViT" else "right"]
    own = model.config._attn_implementation
    sites = Sites.find(model, inputs, attention="eager")
    _, attentions = eager(model, inputs)
    with torch.no_grad(), sites.recording({"attentions": range(sites.depth)}) as found:
        model(**inputs)
    assert model.config._attn_implementation == own
    for layer, weights in enumerate(attentions):
        assert torch.equal(found["attentions", layer], weights)
    with (
        pytest.raises(ConfigError, match="attention_scores are made of queries and keys, not of eager"),
        sites.recording({"attention_scores": (0,)}),
    ):
        pass


def test_what_each_layer_does_is_told():
    def of(name):
        return list(Sites.find(build(name), INPUTS["right"], attention="queries-keys").attention.values())

    assert [(one.window, one.causal) for one in of("ModernBert")] == [(None, False), (4, False), (None, False)]
    assert [(one.window, one.causal) for one in of("Mistral")] == [(4, True)] * 3
    assert [(one.window, one.softcap) for one in of("Gemma2")] == [(4, 0.5), (None, 0.5), (4, 0.5)]
    assert [one.scaling for one in of("GPT2")] == pytest.approx([8**-0.5, 8**-0.5 / 2, 8**-0.5 / 3])
    assert (of("Llama")[0].heads, of("Llama")[0].key_heads, of("Llama")[0].head_dim) == (4, 2, 16)
    model = build("GptOss")
    sites = Sites.find(model, INPUTS["right"], attention="queries-keys")
    assert sites.attention[1].sinks == pytest.approx(model.model.layers[1].self_attn.sinks.tolist())


def test_a_window_longer_than_the_batch_is_told():
    settings = {**DECODER, "sliding_window": 4096}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**settings))
    assert Sites.find(model, INPUTS["full"], attention="queries-keys").attention[0].window == 4096
    settings = {**ENCODERS["ModernBert"][1], "local_attention": 100}
    model = transformers.ModernBertModel(transformers.ModernBertConfig(**settings))
    assert Sites.find(model, INPUTS["full"], attention="queries-keys").attention[1].window == 51


def _with_bias():
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def _in_chunks():
    settings = {**DECODER, "attention_chunk_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 48}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**settings))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("DebertaV2"), "does not come through transformers' AttentionInterface"),
        (_with_bias, "probabilities differ by .*; at most 1e-05 expected"),
        (_in_chunks, "masks keys other than by a window"),
    ],
)
def test_attention_that_is_not_modelled_is_refused(make, message):
    model = make()
    own = model.config._attn_implementation
    with pytest.raises(ConfigError, match=f"{message}.*exact attentions"):
        Sites.find(model, INPUTS["right"], attention="queries-keys")
    assert model.config._attn_implementation == own
    assert Sites.find(model, INPUTS["right"], attention="eager").depth == model.config.num_hidden_layers


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is an encoder-decoder"):
        Sites.find(transformers.T5ForConditionalGeneration(config), INPUTS["right"])
