"""What can go wrong, drawn once.

    PredistillError(Exception)
    ├── ConfigError            a setting is wrong: which, what came, what is allowed
    ├── DataError              a row or column of the dataset cannot be used: which row, why
    ├── StoreError
    │   ├── StoreIncomplete    417 of 500 shards are there; run the same dump to go on
    │   ├── StoreCorrupt       a file is not what the dump wrote: which, how to make it anew
    │   ├── StoreMismatch      two things that must agree do not: which, both values
    │   └── FormatVersionError made by a newer predistill (2); this one reads 1
    └── OutOfSpace             needs 31 GB, 12 GB free; what was written is safe

Every message says what was expected, what came and what to do about it, on one line.
"""

from __future__ import annotations


class PredistillError(Exception):
    """Base of everything that predistill raises for people to read."""


class ConfigError(PredistillError):
    """A setting is wrong: which one, what came, what is allowed."""


class DataError(PredistillError):
    """A row or a column of the dataset cannot be used: which row, and why."""


class StoreError(PredistillError):
    """Something about a store on disk."""


class StoreIncomplete(StoreError):
    """The dump has not finished: how far it is, and how to go on."""


class StoreCorrupt(StoreError):
    """A file of the store is not what the dump wrote: which file, and how to make it anew."""


class StoreMismatch(StoreError):
    """Two things that must agree do not: which setting, and both values."""


class FormatVersionError(StoreError):
    """The store was made by a newer predistill than this one."""


class OutOfSpace(PredistillError):
    """The disk cannot hold what is to be written; whatever was committed is safe."""
