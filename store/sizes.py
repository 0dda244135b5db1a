"""Sizes as people write them."""

from __future__ import annotations

import re

from .errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?)?b?", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """Bytes in 1048576, "256MB", "20GB" (powers of 1000) or "4GiB" (powers of 1024). Raises ConfigError."""
    found = _SIZE.fullmatch(str(size).strip())
    if not found:
        raise ConfigError(f"a size is written like 256MB, 20GB or 4GiB; got {size!r}")
    unit = (found[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(found[1]) * base ** " kmgt".index(unit[:1] or " "))
