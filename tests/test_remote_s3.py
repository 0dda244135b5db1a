"""Stores in S3, served on this machine by moto. Needs s3fs and moto[server]: skipped where they are not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predistill import StoreError, StoreIncomplete, StoreMismatch, TeacherStore
from predistill.store.remote.config import PullConfig, PushConfig
from predistill.store.remote.pull import pull
from predistill.store.remote.push import push
from predistill.store.verify import verify
from remote_cases import files_of, predistill, wide_store, without_card

pytest.importorskip("s3fs", reason="needs s3fs: pip install predistill[remote]")
pytest.importorskip("moto.server", reason="needs moto[server,s3]")
pytestmark = pytest.mark.filterwarnings("ignore")  # of botocore and its libraries

URL = "s3://stores/team/reviews"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_store(tmp_path_factory.mktemp("wide") / "store")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket `stores`, as a boto3 client sees it."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "topsecret",
        "AWS_DEFAULT_REGION": "us-east-1", "PREDISTILL_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="stores")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def objects(bucket: Any) -> dict[str, bytes]:
    found = bucket.list_objects_v2(Bucket="stores").get("Contents", [])
    return {
        one["Key"].removeprefix("team/reviews/"): bucket.get_object(Bucket="stores", Key=one["Key"])["Body"].read()
        for one in found
    }


def test_there_and_back(bucket: Any, wide: Path, tmp_path: Path) -> None:
    push(PushConfig(str(wide), URL, license="mit"))
    there = objects(bucket)
    assert there.pop("README.md").startswith(b"---") and there == without_card(wide)
    assert push(PushConfig(str(wide), URL))["sent"] == 0
    pull(PullConfig(URL, str(tmp_path / "pulled")))
    pulled = files_of(tmp_path / "pulled")
    assert pulled.pop("README.md") and pulled == without_card(wide)


def test_a_part(bucket: Any, wide: Path, tmp_path: Path) -> None:
    push(PushConfig(str(wide), URL))
    found = pull(PullConfig(URL, str(tmp_path / "part"), fields=["teacher_confidence"], where="source_index < 16"))
    assert found["shards"] == 2 and found["fetched"] < 100_000
    assert verify(tmp_path / "part")["ok"]


def test_opened_where_it_is(bucket: Any, wide: Path, tmp_path: Path) -> None:
    push(PushConfig(str(wide), URL))
    with TeacherStore.open(URL) as there, TeacherStore.open(wide) as here:
        rows = [store.select(split="train", where="label = 2")[[0, 5]] for store in (there, here)]
        np.testing.assert_array_equal(rows[0]["teacher_logits"], rows[1]["teacher_logits"])


def test_half_a_store_and_one_that_changes(bucket: Any, wide: Path, tmp_path: Path) -> None:
    push(PushConfig(str(wide), URL))
    store = TeacherStore.open(URL)
    push(PushConfig(str(wide_store(tmp_path / "other", seed=4)), URL, overwrite=True))
    with pytest.raises(StoreMismatch, match="changed while it was read"):
        store.select(split="train")[0]
    store.close()
    bucket.delete_object(Bucket="stores", Key="team/reviews/store.json")
    with pytest.raises(StoreIncomplete, match="half a store"):
        pull(PullConfig(URL, str(tmp_path / "pulled")))


def test_refusals_are_one_line(bucket: Any, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="is not a store, or is not there"):
        pull(PullConfig("s3://nothing/here", str(tmp_path / "pulled")))
    with pytest.raises(StoreError, match="there is no such bucket"):  # none is made in passing
        push(PushConfig(str(wide), "s3://nothing/here"))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    done = predistill("pull", URL, tmp_path / "pulled", check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no permission" in done.stderr or "is not a store" in done.stderr
