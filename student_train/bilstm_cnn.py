"""`bilstm-cnn`: a tagger of words that is no transformer, some 3M parameters, and many times faster than one.

A word is its embedding beside the maxima of a convolution over its letters; two bidirectional LSTMs read the row, and a
linear layer gives the logits: Ma and Hovy 2016 (arXiv:1603.01354), without its CRF, in the sizes of NLP Architect.
Importing this module tells transformers' Auto classes of it, so that a saved student loads:

    import predistill.student_train.bilstm_cnn
    model, tokenizer = predistill.student_train.bilstm_cnn.load("runs/tagger")
    model.tag([["Anna", "lives", "in", "Oslo"]], tokenizer)

B rows, W words, L letters of a word, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import TokenClassifierOutput

from .settings import BILSTM_CNN
from .words.vocabulary import PAD, UNKNOWN, WordTokenizer


class BiLstmCnnConfig(PretrainedConfig):
    """vocab_size, num_characters: of the WordTokenizer beside it. hidden_size: of an LSTM in one direction.

    dropout: of what LSTMs and classifier read. unknown_rate: part of the words that training shows as unknown ones, so
    that their letters are heeded.
    """

    model_type = BILSTM_CNN

    def __init__(
        self, vocab_size: int = 2, num_characters: int = 2, word_embedding_size: int = 100,
        character_embedding_size: int = 30, character_filters: int = 30, character_kernel: int = 3,
        max_characters: int = 20, hidden_size: int = 200, num_hidden_layers: int = 2, dropout: float = 0.5,
        unknown_rate: float = 0.05, **more: Any,
    ) -> None:  # fmt: skip
        self.vocab_size, self.num_characters, self.max_characters = vocab_size, num_characters, max_characters
        self.word_embedding_size, self.character_embedding_size = word_embedding_size, character_embedding_size
        self.character_filters, self.character_kernel = character_filters, character_kernel
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.dropout, self.unknown_rate = dropout, unknown_rate
        more.setdefault("pad_token_id", PAD)
        super().__init__(**more)


class BiLstmCnnForTokenClassification(PreTrainedModel):
    """Logits [B, W, C] of words [B, W] and their letters [B, W, L]."""

    config_class = BiLstmCnnConfig
    base_model_prefix = ""
    usage = (  # of a model card
        "from predistill.student_train.bilstm_cnn import load",
        "",
        'model, tokenizer = load("path/to/this/folder")',
        'model.tag([["words", "of", "a", "row"]], tokenizer)',
    )

    def __init__(self, config: BiLstmCnnConfig) -> None:
        super().__init__(config)
        size, kernel, width = config.character_embedding_size, config.character_kernel, config.hidden_size
        self.words = nn.Embedding(config.vocab_size, config.word_embedding_size, padding_idx=PAD)
        self.characters = nn.Embedding(config.num_characters, size, padding_idx=PAD)
        self.convolution = nn.Conv1d(size, config.character_filters, kernel, padding=kernel // 2)
        self.lstm = nn.LSTM(
            config.word_embedding_size + config.character_filters, width, config.num_hidden_layers, batch_first=True,
            bidirectional=True, dropout=config.dropout if config.num_hidden_layers > 1 else 0.0,
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(2 * width, len(config.id2label or {}))
        self.post_init()

    def forward(
        self, input_ids: Tensor, char_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> TokenClassifierOutput:
        """input_ids, attention_mask, labels [B, W]; char_ids [B, W, L], 0 past a word's letters."""
        mask = input_ids != PAD if attention_mask is None else attention_mask.bool()
        if self.training and self.config.unknown_rate:
            hidden = torch.rand(input_ids.shape, device=input_ids.device) < self.config.unknown_rate
            input_ids = input_ids.masked_fill(hidden & mask, UNKNOWN)
        letters = self.words.weight.new_zeros(*mask.shape, self.config.character_filters)
        letters[mask] = self._spelled(char_ids[mask]).to(letters.dtype)
        read = self.dropout(torch.cat([self.words(input_ids), letters], -1))
        packed = pack_padded_sequence(read, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=mask.shape[1])
        logits = self.classifier(self.dropout(hidden))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)

    def _spelled(self, letters: Tensor) -> Tensor:
        """[N, L] of N words -> [N, filters]; nothing past a word's end enters the maximum."""
        letters = letters[:, : int((letters != PAD).sum(1).max())]
        found = self.convolution(self.dropout(self.characters(letters)).transpose(1, 2))
        found = found[..., : letters.shape[1]]  # one more where the kernel is even
        return found.masked_fill((letters == PAD)[:, None], -torch.inf).amax(-1)

    @torch.no_grad()
    def tag(self, rows: Sequence[Sequence[str]], tokenizer: WordTokenizer, batch_size: int = 64) -> list[list[str]]:
        """The name of each word's tag. Rows without words have none."""
        was, names = self.training, dict(self.config.id2label or {})
        tags: list[list[str]] = [[] for _ in rows]
        self.eval()
        order = sorted((at for at, row in enumerate(rows) if len(row)), key=lambda at: -len(rows[at]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = {name: value.to(self.device) for name, value in tokenizer([rows[at] for at in chosen]).items()}
            found = self(**inputs).logits.argmax(-1).tolist()
            for at, ids in zip(chosen, found, strict=True):
                tags[at] = [names[one] for one in ids[: len(rows[at])]]
        self.train(was)
        return tags

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def set_input_embeddings(self, value: Any) -> None:
        self.words = value

    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings uniform within sqrt(3 / size), as Ma and Hovy have them; the rest as torch would."""
        if isinstance(module, nn.Embedding):
            bound = (3 / module.embedding_dim) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            if not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[PAD])
        elif isinstance(module, nn.LSTM):
            bound = module.hidden_size**-0.5
            for weight in module.parameters():
                init.uniform_(weight, -bound, bound)
        elif isinstance(module, nn.Linear | nn.Conv1d):
            bound = module.weight[0].numel() ** -0.5
            for weight in module.parameters():
                init.uniform_(weight, -bound, bound)


def load(folder: str | Path) -> tuple[BiLstmCnnForTokenClassification, WordTokenizer]:
    """A saved tagger and its tokenizer, ready to tag."""
    model = BiLstmCnnForTokenClassification.from_pretrained(folder)
    return model.eval(), WordTokenizer.from_pretrained(folder)


AutoConfig.register(BILSTM_CNN, BiLstmCnnConfig, exist_ok=True)
AutoModelForTokenClassification.register(BiLstmCnnConfig, BiLstmCnnForTokenClassification, exist_ok=True)
