"""An S3-compatible server, started once, and an empty bucket for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fastvideo import storage
from fastvideo.tests.storage.server import Proxy, environment, s3_server


@pytest.fixture(scope="session")
def running_server() -> Iterator[Proxy]:
    with s3_server() as proxy:
        yield proxy


@pytest.fixture
def server(running_server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The server, in the environment of this test; what is fetched goes into a cache of its own."""
    for key, value in {**environment(running_server), "FASTVIDEO_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(key, value)
    storage._system.cache_clear()
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)  # its own patience is not under test
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield running_server
    if running_server.dead.is_set():
        running_server.mend()


@pytest.fixture
def bucket(server: Proxy) -> str:
    """URL of an empty bucket."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"
