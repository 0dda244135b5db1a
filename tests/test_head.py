"""A head apart from its model gives the model's own logits, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from predistill.store import ConfigError
from predistill.store.head import Head, head_module, hidden_before_head, split_head
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")  # what architectures say of tiny settings is theirs
_WIDE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_OPT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
_RECURRENT = {**_WIDE, "num_hidden_layers": 3, "intermediate_size": 96, "lru_width": 32}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], float, float | None]] = {  # config, settings, scale, soft-cap
    "gpt2": ("GPT2Config", _GPT, 1, None),
    "llama": ("LlamaConfig", _WIDE, 1, None),
    "llama-tied": ("LlamaConfig", {**_WIDE, "tie_word_embeddings": True}, 1, None),
    "qwen3": ("Qwen3Config", _GROUPED, 1, None),
    "gemma2": ("Gemma2Config", {**_GROUPED, "final_logit_softcapping": 5.0}, 1, 5.0),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, "final_logit_softcapping": 20.0}, 1, 20.0),
    "gemma3-uncapped": ("Gemma3TextConfig", _GROUPED, 1, None),
    "recurrent-gemma": ("RecurrentGemmaConfig", _RECURRENT, 1, 30.0),
    "cohere": ("CohereConfig", {**_WIDE, "logit_scale": 0.0625, "eos_token_id": 1}, 0.0625, None),
    "granite": ("GraniteConfig", {**_WIDE, "logits_scaling": 8.0}, 0.125, None),
    "hyperclovax": ("HyperCLOVAXConfig", {**_WIDE, "logits_scaling": 0.3}, 0.3, None),
    "phi": ("PhiConfig", _WIDE, 1, None),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}, 1, None),
    "opt": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 16, "max_position_embeddings": 64}, 1, None),
    "gpt-neox": ("GPTNeoXConfig", _WIDE, 1, None),
    "bloom": ("BloomConfig", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 1, None),
    "mamba": ("MambaConfig", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, 1, None),
}
BIASED = ("phi", "gptj")


def model(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config, settings, _, _ = ARCHITECTURES[name]
    built = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings))
    with torch.no_grad():  # real logits are not near zero, and real biases are not zero
        for parameter in built.get_output_embeddings().parameters():
            parameter.normal_(0, 0.5)
    return built.to(dtype).eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def before_head(one: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with hidden_before_head(one) as found:
        made = one(**inputs).logits
    return found.hidden, made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_gives_the_models_own_logits(name: str, dtype: torch.dtype) -> None:
    built, inputs = model(name, dtype), batch()
    head = split_head(built, inputs)
    assert head is not None
    with torch.no_grad():
        own = built(**inputs).logits
        hidden, made = before_head(built, inputs)
    assert hidden.shape[:2] == (2, 9) and made.shape == (2, 1, 97)
    assert (head.scale, head.softcap) == ARCHITECTURES[name][2:] and (head.bias is not None) == (name in BIASED)
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert (head.logits(hidden) - own).abs().max() <= bound * own.abs().max()
    assert torch.equal(built(**inputs).logits, own)  # nothing was left behind
    assert "forward" not in vars(head_module(built))


def test_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(7, 3, generator=generator), torch.randn(7, generator=generator)
    hidden = torch.randn(2, 5, 3, generator=generator)
    product = torch.einsum("bsd,vd->bsv", hidden.double(), weight.double())
    torch.testing.assert_close(Head(weight).logits(hidden), product.float())
    expected = 4 * torch.tanh(0.5 * (product + bias.double()) / 4)
    torch.testing.assert_close(Head(weight, bias, 0.5, 4.0).logits(hidden), expected.float())
    assert Head(weight.double()).logits(hidden).dtype == torch.float64
    assert Head(weight.bfloat16()).logits(hidden).dtype == torch.float32


def lora(**more: Any) -> Callable[[Any], Any]:
    peft = pytest.importorskip("peft")
    return lambda built: peft.get_peft_model(built, peft.LoraConfig(task_type="CAUSAL_LM", **more))


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel,  # as DDP: the model is its .module
        lambda built: torch.compile(built, backend="eager"),
        lambda built: lora(target_modules=["q_proj"])(built),
        lambda built: lora(target_modules=["q_proj"], modules_to_save=["lm_head"])(built),
    ],
    ids=["parallel", "compile", "lora", "lora-and-head"],
)
def test_wrapped_models(wrap: Callable[[Any], Any]) -> None:
    wrapped, inputs = wrap(model()), batch()
    own = wrapped(**inputs).logits  # a compiled model was compiled without us
    for _ in range(2):
        head = split_head(wrapped, inputs)
        hidden, made = before_head(wrapped, inputs)
        assert head is not None and made.shape == (2, 1, 97)
        torch.testing.assert_close(head.logits(hidden), own)
        assert torch.equal(wrapped(**inputs).logits, own)


def test_gradients_flow_through_the_hidden_states() -> None:
    built, inputs = model("gemma2"), batch()
    built.gradient_checkpointing_enable()
    built.train()
    head = split_head(built, inputs)
    assert head is not None and built.training and all(each.training for each in built.modules())
    built(**inputs).logits.square().mean().backward()
    expected = {name: each.grad.clone() for name, each in built.named_parameters()}
    built.zero_grad()
    hidden, _ = before_head(built, inputs)
    head.logits(hidden).square().mean().backward()
    for name, each in built.named_parameters():
        torch.testing.assert_close(each.grad, expected[name], rtol=1e-5, atol=1e-7)


def test_autocast() -> None:
    built, inputs = model(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        head = split_head(built, inputs)
        assert head is not None
        hidden, _ = before_head(built, inputs)
        torch.testing.assert_close(head.logits(hidden), built(**inputs).logits.float())


def _unknown_factor(built: Any) -> Any:
    head = built.get_output_embeddings()
    head.register_forward_hook(lambda _module, _given, output: output * 1.01)
    return built


def _all_zero(built: Any) -> Any:
    torch.nn.init.zeros_(built.get_output_embeddings().weight)
    return built


def _all_positions(built: Any) -> Any:
    inner = built.forward

    def forward(**inputs: Any) -> Any:
        output = inner(**inputs)
        output.logits = output.logits.view(2, 9, 97)
        return output

    built.forward = forward
    return built


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", _unknown_factor),
        ("gemma2", _all_zero),  # zero whatever the cap
        ("llama", lambda built: lora(target_modules=["lm_head"])(built)),
        ("llama", lambda built: torch.nn.Linear(3, 4)),
        ("llama", _all_positions),
    ],
)
def test_heads_that_cannot_be_split(name: str, change: Callable[[Any], Any]) -> None:
    assert split_head(change(model(name)), batch()) is None


def test_models_with_an_encoder_are_refused() -> None:
    config = transformers.T5Config(vocab_size=97, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
    inputs = {"input_ids": batch()["input_ids"], "decoder_input_ids": batch()["input_ids"]}
    assert split_head(transformers.T5ForConditionalGeneration(config), inputs) is None


def test_what_the_model_itself_raises_comes_through() -> None:
    with pytest.raises(IndexError, match="out of range"):
        split_head(model("gpt2"), {"input_ids": torch.full((1, 3), 2000)})


def test_a_model_without_a_head() -> None:
    with pytest.raises(ConfigError, match="Linear has no output embeddings"), hidden_before_head(torch.nn.Linear(2, 2)):
        pass
    with hidden_before_head(model()) as found, pytest.raises(ConfigError, match="did not call its head"):
        _ = found.hidden


def test_devices_mapped_by_accelerate() -> None:
    """accelerate replaces the head's forward; it must be there again, and be called."""
    hooks = pytest.importorskip("accelerate.hooks")
    built, inputs = model(), batch()
    own = built(**inputs).logits
    hooks.add_hook_to_module(built.lm_head, hooks.AlignDevicesHook("cpu"))
    theirs = built.lm_head.forward
    head = split_head(built, inputs)
    assert head is not None and built.lm_head.forward is theirs
    hidden, _ = before_head(copy.copy(built), inputs)
    torch.testing.assert_close(head.logits(hidden), own)
