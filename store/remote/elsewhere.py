"""A place that stores are shared at: a Hub repository, or whatever fsspec opens (s3://, gs://, file://, memory://).

    place = open_place("hf://datasets/user/name")
    place.read("store.json"), place.read("shards/train-00000.arrow", 0, 4096), place.stat("samples.parquet")

A Hub repository is read at one commit, that of the moment it was opened; elsewhere files are told apart by ETag, or by
time and size. Credentials come from where the libraries look for them, and are in no message.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from ..errors import ConfigError, OutOfSpace, PredistillError, StoreCorrupt, StoreError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?")
_SECRETS = (  # what may stand in a library's message, and what is left of it
    (re.compile(r"(\w://)[^/@\s]*@"), r"\1"),
    (re.compile(r"(\w://[^\s?'\"]*)\?[^\s'\"]+"), r"\1"),
    (re.compile(r"\b(hf_|AKIA|ASIA)\w{8,}"), r"\1…"),
)
_TAGS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
_OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"}  # no folders there; making one may make a bucket
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = {"NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError", "NoAuthInRequest"}
_TRIES = 4
PAUSE = 0.5  # seconds before the second try; twice as long before each further one


class Stat(NamedTuple):
    """bytes, and what changes where the file does: an ETag, a time, a blob's id."""

    size: int
    tag: str


class Place(Protocol):
    """Files by name below one address. `url` is for people: it has neither user nor query."""

    url: str

    @property
    def address(self) -> str:
        """What opens the same place again, in the same state where it has states."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file. Raises FileNotFoundError."""

    def stat(self, name: str) -> Stat | None:
        """None where there is no such file."""


def is_url(path: Any) -> bool:
    return isinstance(path, str) and _SCHEME.match(path) is not None


def clean(text: str) -> str:
    """Without users, passwords, queries and tokens."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def open_place(url: str, revision: str | None = None) -> Place:
    """Raises ConfigError for an address that cannot be, StoreError for one that is not there or not to be read."""
    if url.startswith("hf://"):
        return HubPlace(url, revision)
    if revision is not None:
        raise ConfigError(f"--revision is for hf:// addresses; {clean(url)} has no revisions")
    return FilePlace(url)


class FilePlace:
    """A folder of any fsspec file system."""

    def __init__(self, url: str):
        self.url = clean(url).partition("?")[0].rstrip("/")
        try:
            from fsspec.core import url_to_fs

            self.fs, root = url_to_fs(url, use_listings_cache=False) if is_url(url) else _local(url)
        except ImportError as error:
            raise ConfigError(
                f"{self.url} needs a library that is not installed ({error}): pip install predistill[remote]"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{self.url}: {clean(str(error))}") from error
        self.root, self.address = root.rstrip("/"), url

    @property
    def is_local(self) -> bool:
        return "file" in self._protocols

    @property
    def _protocols(self) -> set[str]:
        return {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)

    def path(self, name: str) -> str:
        path = f"{self.root}/{name}"
        if self.is_local and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root)):
            raise StoreCorrupt(f"{self.url}/{name} leads out of its folder; a store has no such links")
        return path

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with explained(f"{self.url}/{name}"):
            try:
                data: bytes = patiently(lambda: self.fs.cat_file(self.path(name), start=start, end=stop))
                ignored = stop is not None and len(data) > stop - start  # a server that knows no ranges
                return data[start:stop] if ignored else data
            except FileNotFoundError:
                raise
            except Exception:
                found = self.stat(name) if start else None
                if found is not None and found.size <= start:  # asked beyond the end, some answer with an error
                    return b""
                raise

    def stat(self, name: str) -> Stat | None:
        with explained(f"{self.url}/{name}"):
            try:
                info = patiently(lambda: self.fs.info(self.path(name)))
            except (FileNotFoundError, NotADirectoryError):
                return None
        if info.get("type") == "directory":
            return None
        return Stat(int(info["size"]), str(next((info[key] for key in _TAGS if info.get(key)), "")))

    def put(self, local: Path, name: str) -> None:
        """Under its final name once it is whole: object stores do so by themselves."""
        with explained(f"{self.url}/{name}"), self._written():
            path = self.path(name)
            if not self._protocols & _OBJECTS:
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            arriving = f"{path}.part" if self.is_local else path
            patiently(lambda: self.fs.put_file(str(local), arriving))
            if self.is_local:
                os.replace(arriving, path)

    def put_text(self, text: str, name: str) -> None:
        with explained(f"{self.url}/{name}"), self._written():
            self.fs.pipe_file(self.path(name), text.encode())

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(f"{self.url}: there is no such bucket, or folder, to write to") from error

    def remove(self, name: str) -> None:
        with explained(f"{self.url}/{name}"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder; none where there is none."""
        with explained(f"{self.url}/{folder}"):
            try:
                return [str(path).rpartition("/")[2] for path in self.fs.ls(self.path(folder), detail=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []


class HubPlace:
    """A dataset repository of the Hugging Face Hub, or a folder in it, at one commit."""

    def __init__(self, url: str, revision: str | None = None):
        found = _HUB.fullmatch(url.rstrip("/"))
        if not found:
            raise ConfigError(f"a Hub address is hf://datasets/USER/NAME[@REVISION][/FOLDER]; got {clean(url)}")
        if found["revision"] and revision and found["revision"] != revision:
            raise ConfigError(f"{clean(url)} says revision {found['revision']}, --revision says {revision}")
        self.url, self.repo, self.folder = url.rstrip("/"), found["repo"], (found["path"] or "").strip("/")
        from huggingface_hub import HfApi

        self.api, self.revision = HfApi(), revision or found["revision"] or "main"
        self._commit: str | None = None

    @property
    def commit(self) -> str:
        if self._commit is None:
            with explained(self.url):
                info = self.api.repo_info(self.repo, repo_type="dataset", revision=self.revision)
            self._commit = info.sha or self.revision
        return self._commit

    @property
    def address(self) -> str:
        return f"hf://datasets/{self.repo}@{self.commit}/{self.folder}".rstrip("/")

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def moved(self, commit: str) -> None:
        """To a later commit, which this process has made."""
        self._commit = commit

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        if stop is not None and stop <= start:
            return b""
        url = f"{self.api.endpoint}/datasets/{self.repo}/resolve/{self.commit}/{quote(self.path(name))}"
        span = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        with explained(f"{self.url}/{name}"):
            headers = {**build_hf_headers(), **span}
            response = http_backoff("GET", url, headers=headers, timeout=30, follow_redirects=True)
            if response.status_code == 416:  # the file ends before `start`
                return b""
            hf_raise_for_status(response)
        if span and response.status_code != 206:  # the whole file in place of a part
            return response.content[start:stop]
        return response.content

    def stat(self, name: str) -> Stat | None:
        return self.stats([name]).get(name)

    def stats(self, names: list[str]) -> dict[str, Stat]:
        """Of the files among these that are there; a tag is a sha256 for large files, a git blob's id for others."""
        from huggingface_hub.hf_api import RepoFile

        found, place = {}, {self.path(name): name for name in names}
        with explained(self.url):
            for begin in range(0, len(names), 200):
                asked = list(place)[begin : begin + 200]
                for one in self.api.get_paths_info(self.repo, asked, revision=self.commit, repo_type="dataset"):
                    if isinstance(one, RepoFile):
                        found[place[one.path]] = Stat(one.size, one.lfs.sha256 if one.lfs else one.blob_id)
        return found


def _local(path: str) -> tuple[Any, str]:
    from fsspec.implementations.local import LocalFileSystem

    return LocalFileSystem(), str(Path(path).expanduser().absolute())


def patiently(call: Any) -> Any:
    """What the call gives; tried again where the network, not the request, may be at fault."""
    for attempt in range(_TRIES):
        try:
            return call()
        except Exception as error:
            if attempt == _TRIES - 1 or not _may_pass(error):
                raise
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ClientConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ServerTimeoutError",
                         "IncompleteRead", "ClientPayloadError"})  # fmt: skip


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """What a library raises about an address, in one line. A file that is not there stays a FileNotFoundError."""
    try:
        yield
    except (PredistillError, FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:
        raise _explain(clean(where), error) from None


def _explain(where: str, error: Exception) -> Exception:
    names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OSError) and error.errno in _FULL:
        return OutOfSpace(f"{where}: {os.strerror(error.errno or 0)}; what is there stays: make room, then go on with "
                          "the same command")  # fmt: skip
    if "GatedRepoError" in names:
        return StoreError(f"{where} is gated: ask for access on its page of the Hub, then log in with `hf auth login`")
    if "RepositoryNotFoundError" in names:
        return StoreError(f"{where}: there is no such repository, or this account may not see it: check the name, or "
                          "log in with `hf auth login`")  # fmt: skip
    if "RevisionNotFoundError" in names:
        return StoreError(f"{where}: the repository has no such revision")
    if "EntryNotFoundError" in names:
        return FileNotFoundError(where)
    if isinstance(error, PermissionError) or status in (401, 403) or names & _DENIED:
        return StoreError(f"{where}: no permission; check the credentials of this machine, and what they are allowed")
    if "OfflineModeIsEnabled" in names:
        return StoreError(f"{where} cannot be reached: HF_HUB_OFFLINE is set")
    if isinstance(error, ImportError):
        return ConfigError(f"{where} needs a library that is not installed ({error}): pip install predistill[remote]")
    message = clean(" ".join(str(error).split()))[:300]
    return StoreError(f"{where}: {type(error).__name__}{': ' if message else ''}{message}; go on with the same command")
