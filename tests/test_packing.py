"""Packed rows against a loop over tokens; models that keep documents apart and models that do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from predistill.store import ConfigError
from predistill.teacher_dump.rows.packing import check_packing, pack
from transformers import AutoModelForCausalLM as Auto
from transformers import BloomConfig, FalconConfig, Gemma3TextConfig, GPT2Config, Lfm2Config, LlamaConfig, Qwen3Config

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CPU = torch.device("cpu")
LAYERS = ["sliding_attention", "full_attention"]
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
APART = {
    "gpt2": GPT2Config(**GPT2, bos_token_id=1, eos_token_id=1),
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=16, layer_types=LAYERS),
}
TOGETHER = {
    "falcon": FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "lfm2": Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),  # one layer of two looks back without a mask
}


def slowly(lengths: list[int], size: int) -> list[tuple[int, int, list[int]]]:
    """(document, view, position ids) of each row, a token at a time."""
    rows: list[tuple[int, int, list[int]]] = []
    begun: dict[int, int] = {}
    for document, length in enumerate(lengths):
        position = 0
        for _ in range(length):
            if not rows or len(rows[-1][2]) == size:
                rows.append((document, begun.get(document, 0), []))
                begun[document] = begun.get(document, 0) + 1
                position = 0
            rows[-1][2].append(position)
            position += 1
    return rows


@pytest.mark.parametrize("size", [2, 5, 8, 100])
def test_rows_are_full_and_documents_go_on(size: int) -> None:
    for seed in range(20):
        generator = np.random.default_rng(seed)
        lengths = generator.integers(1, 20, generator.integers(1, 9))
        packed, expected = pack(lengths, size), slowly(lengths.tolist(), size)
        assert packed.document.tolist() == [document for document, _, _ in expected]
        assert packed.view.tolist() == [view for _, view, _ in expected]
        assert packed.lengths.tolist() == [len(positions) for _, _, positions in expected]
        assert packed.position_ids.tolist() == [one for _, _, positions in expected for one in positions]
        assert packed.position_ids.dtype == packed.view.dtype == np.int32


def test_a_document_that_ends_with_its_row() -> None:
    packed = pack(np.array([4, 8, 2]), 4)
    assert packed.document.tolist() == [0, 1, 1, 2]
    assert packed.view.tolist() == [0, 0, 1, 0]
    assert packed.position_ids.tolist() == [0, 1, 2, 3] * 3 + [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", APART)
def test_models_that_keep_documents_apart(name: str, attention: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Auto.from_config(APART[name], attn_implementation=attention, dtype=dtype).eval()
    model.config.use_cache = False
    with torch.inference_mode():
        check_packing(model, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOGETHER)
def test_models_that_do_not_are_refused(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Auto.from_config(TOGETHER[name], attn_implementation="eager", dtype=dtype).eval()
    model.config.use_cache = False
    with torch.inference_mode(), pytest.raises(ConfigError, match=f"--packing: .*{type(model).__name__} with eager"):
        check_packing(model, CPU)


def test_a_small_leak_is_seen() -> None:
    """A hundredth of a document's embeddings in the next one's."""

    class Leaking(torch.nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model, self.share = Auto.from_config(APART["llama"]).eval(), share
            self.config, self.dtype = self.model.config, torch.float32

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.model.get_input_embeddings()

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> object:
            values = self.get_input_embeddings()(input_ids)
            before = torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], dim=1)
            return self.model(inputs_embeds=values + self.share * before, position_ids=position_ids)

    with torch.inference_mode():
        check_packing(Leaking(0.0), CPU)
        with pytest.raises(ConfigError, match="must not see each other"):
            check_packing(Leaking(0.01), CPU)


def test_bloom_takes_no_position_ids() -> None:
    """Such a model is refused before it is loaded, by its signature; the probe would refuse it too."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    model = Auto.from_config(BloomConfig(**shape)).eval()
    model.config.use_cache = False
    with torch.inference_mode(), pytest.raises(ConfigError, match="--packing"):
        check_packing(model, CPU)
