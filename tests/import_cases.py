"""Teacher outputs as other programs write them, made of a teacher's exact log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from predistill.store import TeacherStore
from predistill.teacher_dump.import_outputs import import_outputs
from predistill.teacher_dump.importing.config import ImportConfig

VOCABULARY, K = 40, 6
CONFIG = {  # compression_config.yaml, as the program of sampling writes it
    "d": VOCABULARY, "k": K, "exact_k": 2, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32", "residual_bins": [], "delta_encoding": False, "error_diffusion": False,
    "normalize_t": False,
}  # fmt: skip


def documents(count: int, seed: int = 0) -> list[tuple[list[int], np.ndarray]]:
    """(token ids [S], log-probabilities [S, V] of the token after each)."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        size = int(rng.integers(3, 12))
        logits = rng.normal(0, 3, (size, VOCABULARY))
        made.append((rng.integers(0, VOCABULARY, size).tolist(), log_softmax(logits)))
    return made


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def top(logprobs: np.ndarray, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities), [S, k], the largest first."""
    ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logprobs, ids, -1)


def top_k_rows(docs: Iterable[tuple[list[int], np.ndarray]]) -> list[dict[str, Any]]:
    made = []
    for tokens, logprobs in docs:
        ids, values = top(logprobs)
        made.append({"input_ids": list(tokens), "ids": ids.tolist(), "logprobs": values.tolist()})
    return made


def vllm_row(tokens: Sequence[int], logprobs: np.ndarray, k: int = K, ranks: bool = True) -> dict[str, Any]:
    """prompt_logprobs: null first, then the top k and, where it is not among them, the token itself."""
    positions: list[Any] = [None]
    for at, token in enumerate(tokens[1:]):
        order = np.argsort(-logprobs[at], kind="stable")
        ranked = {int(one): place + 1 for place, one in enumerate(order)}
        chosen = dict.fromkeys([int(token), *map(int, order[:k])])
        positions.append({
            str(one): {"logprob": float(logprobs[at][one]), "decoded_token": f"t{one}",
                       **({"rank": ranked[one]} if ranks else {})}
            for one in chosen
        })  # fmt: skip
    return {"prompt_token_ids": list(tokens), "prompt_logprobs": positions}


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def imported(source: Path | str, folder: Path, **more: Any) -> TeacherStore:
    import_outputs(ImportConfig(source=str(source), output_dir=str(folder), **more))
    return TeacherStore.open(folder)


def stored(store: TeacherStore, row: int) -> dict[int, dict[int, float]]:
    """{position: {id: log-probability}} of one row, read with what the format's page says."""
    found = store.select()[row]
    positions = np.flatnonzero(found["teacher_mask"]) if "teacher_mask" in found else range(len(found["input_ids"]))
    made = {}
    for at in positions:
        logits = found["teacher_top_k_logits"][at].astype(np.float64)
        there = logits > -30000
        logprobs = logits - found["teacher_logsumexp"][at]
        pairs = zip(found["teacher_top_k_indices"][at][there].tolist(), logprobs[there].tolist(), strict=True)
        made[int(at)] = dict(pairs)
    return made


def distillkit(folder: Path, docs: Iterable[tuple[list[int], np.ndarray]], said: dict[str, Any]) -> Path:
    """What DistillKit's sampling leaves: values sorted, some exact, the rest a polynomial and residuals in bins; by
    torch, after the description of its format."""
    import torch
    import yaml

    folder.mkdir()
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(said))
    rows = []
    for tokens, logprobs in docs:
        ids, values = top(logprobs[:-1], said["k"])
        work = torch.tensor(values)
        if said["delta_encoding"]:
            work = torch.cat([work[:, :1], work[:, 1:] - work[:, :-1]], -1)
        parts = [work[:, : said["exact_k"]].to(getattr(torch, said["exact_dtype"])).view(torch.uint8)]
        rest = work[:, said["exact_k"] :]
        if said["polynomial_terms"]:
            size = rest.shape[1]
            t = torch.linspace(0, 1, size).double() if said["normalize_t"] else torch.arange(size).double()
            terms = [t**one if isinstance(one, int) else getattr(torch, one)(t) for one in said["polynomial_terms"]]
            design = torch.stack(terms, -1)
            coefficients = torch.linalg.lstsq(design, rest.T).solution.T.to(getattr(torch, said["term_dtype"]))
            rest = rest - coefficients.double() @ design.T
            parts.append(coefficients.contiguous().view(torch.uint8))
        start = 0
        for one in said["residual_bins"]:
            own = rest[:, start : start + one["num_elements"]]
            start += one["num_elements"]
            half = 2 ** (one["element_bits"] - 1)
            scale = (own.abs().amax(-1, keepdim=True) / half).to(getattr(torch, one["scale_dtype"]))
            levels = (own / scale.double()).round().clamp(-half, half - 1).long() + half
            parts += [scale.contiguous().view(torch.uint8), torch.tensor(bits(levels.tolist(), one["element_bits"]))]
        width = int(np.ceil(np.log2(said["d"])))
        rows.append({
            "input_ids": tokens, "compressed_logprobs": torch.cat(parts, -1).tolist(),
            "bytepacked_indices": bits(ids.tolist(), width),
        })  # fmt: skip
    kind = pa.list_(pa.list_(pa.uint8()))
    columns = pa.schema(
        [("input_ids", pa.list_(pa.uint64())), ("compressed_logprobs", kind), ("bytepacked_indices", kind)]
    )
    for number, first in enumerate(range(0, len(rows), 5)):  # data_10 must come after data_2
        pq.write_table(pa.Table.from_pylist(rows[first : first + 5], columns), folder / f"data_{number}.parquet")
    return folder


def bits(numbers: list[list[int]], width: int) -> list[list[int]]:
    """Each row's numbers as one stream of bits, the most significant first, in bytes."""
    made = []
    for row in numbers:
        text = "".join(f"{one:0{width}b}" for one in row)
        text += "0" * (-len(text) % 8)
        made.append([int(text[at : at + 8], 2) for at in range(0, len(text), 8)])
    return made
