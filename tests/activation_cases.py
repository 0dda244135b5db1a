"""Tiny models of many architectures, with what transformers itself says is inside them."""

import torch
import transformers
from torch import nn

TINY: dict = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**TINY, **SPECIAL, "num_key_value_heads": 2, "head_dim": 16}
IMAGE = {**TINY, "image_size": 8, "patch_size": 4}
IMAGE.pop("vocab_size")
DISTILBERT = {"vocab_size": 99, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}

ENCODERS: dict[str, tuple[str, dict]] = {
    "Bert": ("ForTokenClassification", TINY),
    "Roberta": ("ForSequenceClassification", {**TINY, **SPECIAL}),
    "Electra": ("ForSequenceClassification", {**TINY, "embedding_size": 16}),
    "DistilBert": (
        "ForSequenceClassification",
        {"vocab_size": 99, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    ),
    "Albert": ("ForSequenceClassification", {**TINY, "embedding_size": 16}),
    "ModernBert": (
        "ForSequenceClassification",
        {
            **TINY,
            **SPECIAL,
            "local_attention": 6,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
}
DECODERS: dict[str, tuple[str, dict]] = {
    "Llama": ("ForCausalLM", DECODER),
    "Mistral": ("ForCausalLM", {**DECODER, "sliding_window": 4}),
    "Qwen3": ("ForCausalLM", DECODER),
    "Gemma2": (
        "ForCausalLM",
        {**DECODER, "sliding_window": 4, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 3},
    ),
    "Gemma3Text": ("Gemma3ForCausalLM", {**DECODER, "sliding_window": 4, "sliding_window_pattern": 2}),
    "GPT2": (
        "LMHeadModel",
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "scale_attn_by_inverse_layer_idx": True,
            **SPECIAL,
        },
    ),
    "GptOss": ("ForCausalLM", {**DECODER, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
OUTSIDE: dict[str, tuple[str, dict]] = {
    "DebertaV2": (
        "ForSequenceClassification",
        {**TINY, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "ViT": ("ForImageClassification", IMAGE),
}
ALL = {**ENCODERS, **DECODERS, **OUTSIDE}
PACKING = [name for name in DECODERS if name != "GptOss"]  # whose masks pay no heed to positions

IDS = torch.randint(5, 99, (3, 9), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 1, 2, 3, 0, 1, 0, 1]])
INPUTS = {
    "right": {"input_ids": IDS, "attention_mask": RIGHT},
    "left": {"input_ids": IDS, "attention_mask": RIGHT.flip(1)},
    "full": {"input_ids": IDS},
    "packed": {"input_ids": IDS, "position_ids": PACKED, "use_cache": False},
    "image": {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))},
}
CASES = [(name, padding) for name in (*ENCODERS, *DECODERS) for padding in ("right", "left", "full")]
CASES += [(name, "packed") for name in PACKING] + [("ViT", "image")]


def build(name: str):
    """Weights so large that no probability is about 1 / S."""
    ending, settings = ALL[name]
    torch.manual_seed(0)
    kind = ending if ending.startswith("Gemma3") else name + ending
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 or parameter.shape == (4,):  # sinks
            nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 1.0)
    return model


def eager(model, inputs):
    """Hidden states with the model's own attention, attentions with eager attention."""
    own = model.config._attn_implementation
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        model.set_attn_implementation("eager")
        attentions = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(own)
    return states, attentions
