"""Rows of one length, filled with one document after another; and whether a model sees only what it may.

transformers sees where documents begin by position ids that restart, when there is no attention mask; padding has
position 0 at each token, so that each is a document of its own.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...store import ConfigError, DataError
from ...store.head import logits_of

_ROUNDINGS = 4  # units in the last place, of the logits' size, that sums made in another order may differ by
_ALONE = 0.1  # of what seeing the document before changes; rounding in bfloat16 made it 0.02 at most (14 architectures)
_LENGTHS = (7, 5)  # tokens of the two documents of the probe


class Packed(NamedTuple):
    """m rows. lengths: int64 [m]; document: int64 [m], in which a row begins; view: int32 [m], which of the rows that
    begin there; position_ids: int32 [tokens], from 0 where a document begins or goes on in a new row."""

    lengths: np.ndarray
    document: np.ndarray
    view: np.ndarray
    position_ids: np.ndarray


def pack(lengths: np.ndarray, size: int) -> Packed:
    """Documents in order, cut where a row of `size` tokens is full; the last row is as long as what is left.

    lengths: int64 [n], of documents that are not empty. Tokens stay in their order.
    """
    total = int(lengths.sum())
    documents, rows = lengths.cumsum() - lengths, np.arange(0, total, size)
    pieces = np.union1d(documents, rows)
    document = np.searchsorted(documents, rows, side="right") - 1
    view = np.arange(len(rows)) - np.searchsorted(document, document)
    position_ids = np.arange(total) - np.repeat(pieces, np.diff(pieces, append=total))
    return Packed(np.diff(rows, append=total), document, view.astype(np.int32), position_ids.astype(np.int32))


def check_causal(model: Any, device: torch.device) -> None:
    """Run three short texts; device: where the model's inputs go.

    Raises DataError where the logits are NaN whatever is read, ConfigError where later tokens change those of earlier
    ones by more than a share of what the first token changes in them, which is more than rounding.
    """
    vocabulary, kept = _vocabulary(model, device), _LENGTHS[0]
    text = torch.arange(sum(_LENGTHS)).expand(3, -1).clone()
    text[1, kept:] += len(text[0])
    text[2, 0] += len(text[0])
    text = text.remainder(vocabulary).to(device)
    logits = logits_of(model(input_ids=text, attention_mask=torch.ones_like(text))).float()
    if bool(logits.isnan().all()):
        raise DataError(
            f"logits that are numbers expected; those of {type(model).__name__} are NaN whatever it reads: look at its "
            "weights, or compute in another --teacher-dtype"
        )
    own, later, earlier = logits[:, 1:kept]
    if bool((_size(own - later) > _ALONE * _size(own - earlier)).all()):
        raise ConfigError(
            f"{type(model).__name__} sees the tokens that it is to tell, since it is not causal: give a causal teacher "
            "(a BERT-like config needs is_decoder: true)"
        )


def no_mask_is_meant() -> None:
    """Packed rows have no attention mask, and transformers is not to warn of it."""
    logging.getLogger("transformers.modeling_utils").addFilter(_other_than_mask)


def _other_than_mask(record: logging.LogRecord) -> bool:
    return "passing in an `attention_mask`" not in record.getMessage()


def check_packing(model: Any, device: torch.device) -> None:
    """Run two short documents in one row; device: where the model's inputs go.

    Raises ConfigError where the logits of the second depend on the first, or are not what they are alone, by more than
    rounding, and by more than a share of what the first does to the second where both are one document. Batches are of
    two rows, since some attention implementations look for documents only in a batch of one.
    """
    vocabulary = _vocabulary(model, device)
    ids = torch.randint(vocabulary, (2, sum(_LENGTHS)), generator=torch.Generator().manual_seed(0))
    (first, second), (other, another) = (one.split(_LENGTHS) for one in ids.to(device))
    rows = torch.stack([torch.cat([first, second]), torch.cat([second, first])])
    changed = torch.stack([torch.cat([other, second]), torch.cat([another, first])])
    places = [torch.arange(size) for size in _LENGTHS]
    packed = torch.stack([torch.cat(places), torch.cat(places[::-1])]).to(device)
    joined = torch.arange(sum(_LENGTHS)).expand(2, -1).to(device)
    logits = [_logits(model, ids, position_ids) for position_ids in (packed, joined) for ids in (rows, changed)]
    for row, document in enumerate((second, first)):
        one, one_changed, both, both_changed = (each[row, -len(document) :] for each in logits)
        alone = _logits(model, document[None], packed[1 - row, None, : len(document)])[0]
        eps = torch.finfo(model.dtype if hasattr(model, "dtype") else next(model.parameters()).dtype).eps
        rounding = _ROUNDINGS * eps * _size(alone)
        seen = _size(one - one_changed) > eps**0.5 * _size(both - both_changed) + rounding
        if bool((seen | (_size(one - alone) > _ALONE * _size(both - alone) + rounding)).any()):
            raise ConfigError(
                "--packing: documents in one row must not see each other; in "
                f"{type(model).__name__}{_attention(model)} they do, or it pays no heed to position ids: leave "
                "--packing away, or try --attention sdpa"
            )


def _vocabulary(model: Any, device: torch.device) -> int:
    """How many ids it takes; of a module that does not tell, as many as it gives logits."""
    if hasattr(model, "get_input_embeddings"):
        return len(model.get_input_embeddings().weight)
    text = torch.zeros(1, sum(_LENGTHS), dtype=torch.int64, device=device)
    return int(logits_of(model(input_ids=text, attention_mask=torch.ones_like(text))).shape[-1])


def _attention(model: Any) -> str:
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return f" with {name} attention" if name else ""


def _logits(model: Any, ids: Tensor, position_ids: Tensor) -> Tensor:
    return logits_of(model(input_ids=ids, position_ids=position_ids)).float()


def _size(values: Tensor) -> Tensor:
    """Root mean square over the vocabulary: [..., V] to [...]."""
    return values.square().mean(dim=-1).sqrt()
