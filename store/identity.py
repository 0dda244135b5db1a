"""What makes two things the same: hashes of content, never of paths, times or versions of a file format.

A store names its teacher, tokenizer, dataset, task and fields by these hashes; whatever continues it, joins it or
trains from it compares them and is refused by the name of what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import DataError, StoreMismatch

_CHUNK = 1 << 20  # bytes read at a time
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "tf_model*.h5")  # the first that is there
_VOLATILE = ("padding", "truncation", "version")  # state of a tokenizer's last call, and of its file format


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal content, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def digest(value: Any) -> str:
    """sha256, hex, of a JSON-able value's canonical text."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def content_hash(values: Iterable[str | bytes | None]) -> bytes:
    """16 bytes that stand for what a row says: its raw inputs, before any tokenizer, in order.

    Each value enters with its kind and length, so that ("ab", "c") and ("a", "bc") differ.
    """
    state = hashlib.blake2b(digest_size=16)
    for value in values:
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value or b""
        kind = b"n" if value is None else b"s" if isinstance(value, str) else b"b"
        state.update(kind + struct.pack("<q", len(data)))
        state.update(data)
    return state.digest()


def file_sha256(path: Path) -> str:
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of a transformers tokenizer: vocabulary, merges, normaliser, pre-tokenizer, post-processor, added tokens.

    Padding, truncation and versions are left out: a fast tokenizer serialises the state of its last call.
    """
    return digest(tokenizer_content(tokenizer))


def tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    """The parts of a tokenizer that decide its ids, JSON-able."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        content = {key: value for key, value in parts.items() if key not in _VOLATILE}
        model = content.get("model")
        if isinstance(model, dict) and isinstance(model.get("merges"), list):  # "a b" and ["a", "b"] are one merge
            merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
            content["model"] = {**model, "merges": merges}
        return content
    return {
        "class": type(tokenizer).__name__,
        "vocab": tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }


def weights_sha256(folder: str | os.PathLike[str]) -> str:
    """Hash of a model folder's weight files by name and content; cached per file by size and mtime.

    Safetensors where there are any, as transformers prefers them; what a trainer leaves beside them is not the model.
    Raises DataError where the folder holds no weights.
    """
    found = (sorted(path for path in Path(folder).glob(pattern) if path.is_file()) for pattern in _WEIGHTS)
    files = next((files for files in found if files), None)
    if files is None:
        raise DataError(f"{folder}: no weights ({', '.join(_WEIGHTS)}) found")
    return digest([[path.name, _cached_sha256(path)] for path in files])


def state_sha256(state: Mapping[str, Any]) -> str:
    """Hash of a module's state_dict: names, dtypes, shapes and bytes of its tensors; of other entries, their text."""
    import torch

    made = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not isinstance(value, torch.Tensor):
            made.update(canonical([name, value]).encode())
            continue
        made.update(canonical([name, str(value.dtype), list(value.shape)]).encode())
        made.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def _cached_sha256(path: Path) -> str:
    stat = path.stat()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "predistill" / "sha256"
    entry = root / digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    try:
        return entry.read_text()
    except OSError:
        value = file_sha256(path)
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".{os.getpid()}")
        temporary.write_text(value)
        temporary.replace(entry)
    except OSError:  # a cache that cannot be written only costs the next hash
        return value
    return value


def differences(stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, stored, current) of every leaf that differs."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*stored, *current}):
        left, right, name = stored.get(key), current.get(key), f"{prefix}{key}"
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{name}.")
        elif canonical(left) != canonical(right):
            found.append((name, left, right))
    return found


def compare(what: str, stored: Mapping[str, Any], current: Mapping[str, Any], ignore: Sequence[str] = ()) -> None:
    """Raises StoreMismatch naming the first leaf that differs, with both values. `ignore`: information only."""
    found = [one for one in differences(stored, current) if one[0] not in ignore]
    if found:
        name, left, right = found[0]
        more = f" (and {len(found) - 1} more: {', '.join(one[0] for one in found[1:4])})" if len(found) > 1 else ""
        raise StoreMismatch(
            f"{what}: {name} differs: the store has {short(left)}, this run has {short(right)}{more}: "
            "use the same settings, another --output-dir, or --overwrite"
        )


def short(value: Any) -> str:
    """A value as an error message shows it: hashes cut to 12 digits."""
    if isinstance(value, str) and len(value) >= 32 and all(c in "0123456789abcdef" for c in value):
        return value[:12]
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else f"{text[:117]}…"
