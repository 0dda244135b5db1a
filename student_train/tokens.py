"""Do the student's tokens and the store's agree? Where they do not, and need not, text is tokenised anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from ..store.errors import DataError, StoreCorrupt, StoreMismatch
from ..store.identity import short, tokenizer_content, tokenizer_sha256
from ..store.schema import ATTENTION_MASK, INPUT_IDS
from .dataset import narrowed
from .rows_over import RowsOver, numbered

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model",
)  # fmt: skip


def store_tokenizer(store: Any) -> Any:
    """What a store's inputs were made with: of images a processor; None where the store has neither.

    No code of the store's is run, nor asked about. Raises StoreCorrupt where it cannot be loaded.
    """
    if (processor := store.path / "processor").is_dir():
        return _loaded(AutoImageProcessor, processor, backend="pil")
    return _loaded(AutoTokenizer, store.tokenizer_dir) if store.tokenizer_dir else None


def _loaded(kind: Any, folder: Path, **how: Any) -> Any:
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **how)
    except Exception as error:  # transformers and tokenizers raise what they meet: KeyError, RecursionError, Exception
        raise StoreCorrupt(
            f"{folder} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "make the store anew, or see predistill verify"
        ) from error


def student_tokenizer(name: str, store: Any) -> tuple[Any, bool]:
    """The student's tokenizer, else the store's; and whether it gives other ids than the store's."""
    stored = store_tokenizer(store)
    own = load_tokenizer(name) if is_tokenizer(stored) else None  # images come as the store has them
    if own is None or stored is None:
        return own or stored, False
    return own, tokenizer_sha256(own) != tokenizer_sha256(stored)


def is_tokenizer(made: Any) -> bool:
    """Or is it a processor of images?"""
    return not hasattr(made, "preprocess")


def load_tokenizer(name: str) -> Any:
    """None for a folder without tokenizer files."""
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def tokenizer_difference(store: Any, tokenizer: Any) -> str:
    """ "tokenizer differs: store a1b2…, student c3d4… (vocabularies of 30522 and 28996 tokens, normalizer)"."""
    stored = store_tokenizer(store)
    ours, theirs = tokenizer_content(stored), tokenizer_content(tokenizer)
    parts = [part for part in {**ours, **theirs} if part != "model" and ours.get(part) != theirs.get(part)]
    left, right = (one["model"] if isinstance(one.get("model"), Mapping) else {} for one in (ours, theirs))
    parts += [part for part in {**left, **right} if part != "vocab" and left.get(part) != right.get(part)]
    if stored.get_vocab() != tokenizer.get_vocab():
        parts.insert(0, f"vocabularies of {len(stored)} and {len(tokenizer)} tokens")
    return (
        f"tokenizer differs: store {short(tokenizer_sha256(stored))}, "
        f"student {short(tokenizer_sha256(tokenizer))} ({', '.join(parts) or 'model'})"
    )


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Raises DataError where ids of the tokenizer lie outside the student's embeddings."""
    if tokenizer is None or not is_tokenizer(tokenizer):
        return
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    known = getattr(embeddings, "num_embeddings", None)
    if known is not None and len(tokenizer) > known:
        raise DataError(
            f"the student embeds {known} tokens, the tokenizer has {len(tokenizer)}: "
            f"give a student with vocab_size {len(tokenizer)}"
        )


def check_positions(model: nn.Module, longest: int, limit: int | None = None) -> None:
    """Raises DataError where the longest row has more tokens than `limit`: by default its position embeddings."""
    limit = limit or position_limit(model)
    if limit is not None and longest > limit:
        raise DataError(
            f"the student reads at most {limit} tokens, the longest row has {longest}: "
            f'give a student with more positions, or --where "num_tokens <= {limit}"'
        )


def position_limit(model: nn.Module) -> int | None:
    """Tokens that learned position embeddings reach; None where positions are computed."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe") and isinstance(module, nn.Embedding):
            offset = -1 if module.padding_idx is None else module.padding_idx  # RoBERTa counts from pad + 1
            return module.num_embeddings - offset - 1
    return None


class RetokenizedRows(RowsOver):
    """Rows of a store with the tokens of another tokenizer, kept in memory (4 bytes a token, 8 a row).

    Sentence-level teacher fields belong to the row, not to its tokens, so only the inputs are replaced.
    """

    def __init__(self, rows: Any, encoded: Mapping[str, Sequence[Sequence[int]]], pad_token_id: int) -> None:
        self.rows, self.store, self.pad_token_id = rows, rows.store, pad_token_id
        self.lengths = np.fromiter(map(len, encoded[INPUT_IDS]), np.int64, len(rows))
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.tokens = {
            name: np.fromiter((one for row in values for one in row), np.int32, int(self.starts[-1]))
            for name, values in encoded.items() if name != ATTENTION_MASK
        }  # fmt: skip
        self.nbytes = rows.nbytes + sum(values.nbytes for values in self.tokens.values())

    def narrowed(self, fields: Sequence[str], stored: Sequence[str] = ()) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.rows = narrowed(self.rows, fields, stored)
        return other

    def batches(self, indices: Iterable[Sequence[int]], **reading: Any) -> Iterator[dict[str, Any]]:
        for batch, chosen in numbered(self.rows, indices, **reading):
            yield self._replaced(batch, chosen)

    def _batch(self, chosen: np.ndarray) -> dict[str, Any]:
        return self._replaced(self.rows[chosen], chosen)

    def _replaced(self, batch: Mapping[str, Any], chosen: np.ndarray) -> dict[str, Any]:
        lengths = self.lengths[chosen]
        places = np.arange(int(lengths.max(initial=0)))
        mask = places < lengths[:, None]
        entries = np.where(mask, self.starts[chosen, None] + places, 0)
        kept = {name: values for name, values in batch.items() if name not in (*INPUTS, *self.tokens)}
        for name, values in self.tokens.items():
            kept[name] = np.where(mask, values[entries], self._pad(name)).astype(np.int64)
        return {**kept, ATTENTION_MASK: mask.astype(np.int64)}

    def _pad(self, name: str) -> int:
        return self.pad_token_id if name == INPUT_IDS else 0


INPUTS = (INPUT_IDS, "token_type_ids", ATTENTION_MASK)


def retokenized(rows: Any, tokenizer: Any, columns: Sequence[str], max_length: int | None) -> RetokenizedRows:
    """These rows with their kept text in the student's tokens. columns: one, or two for pairs of texts.

    Raises StoreMismatch where the store does not hold the text.
    """
    stored = rows.store.fields
    missing = [name for name in columns if name not in stored]
    if missing or not columns:
        kept = ", ".join(name for name, spec in stored.items() if spec.role == "carried") or "none"
        raise StoreMismatch(
            f"{tokenizer_difference(rows.store, tokenizer)}; text must be tokenised anew, but the store keeps "
            f"no column {missing[0] if missing else 'of text'} (kept columns: {kept}): dump again with "
            f"--keep-columns {','.join(columns) or 'text'}, or name a kept one with --text-column"
        )
    texts = [rows.column(name) for name in columns]
    if any(not isinstance(one, str) for column in texts for one in column):
        raise DataError(f"column {columns[0]} of {rows.store.path} does not hold text in every row")
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    encoded = tokenizer(*texts, truncation=limit < 10**6, max_length=limit if limit < 10**6 else None)
    return RetokenizedRows(rows, {**encoded}, tokenizer.pad_token_id or 0)
