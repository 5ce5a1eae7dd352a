# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Every test starts from the same seed, on one thread per worker, offline, and with no trainer's state left over."""

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from object_storage import CREDENTIALS, ObjectStorage

torch.set_num_threads(1)

# They would lead the client of an S3 server in these tests elsewhere.
ELSEWHERE = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "AWS_PROFILE")


def pytest_configure(config: pytest.Config) -> None:
    """Marks of Transformers' common tests, which `test_transformers_common` imports where their sources are."""
    for mark in ("accelerate", "flash_attn", "flash_attn_3", "flash_attn_4", "torch_compile"):
        config.addinivalue_line("markers", f"{mark}_test{'s' * (mark == 'accelerate')}: of Transformers")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps device and precision for the life of a process: the next test may want others."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What has been flushed to the disk, in order: files, and of folders each entry that they had."""
    from modeling_t3d.training import files

    flushed: list[Path] = []
    flush = files.flush

    def note(path: Path) -> None:
        flush(path)
        flushed.extend(path.iterdir() if path.is_dir() else [path])

    monkeypatch.setattr(files, "flush", note)
    return flushed


@pytest.fixture(scope="session")
def storage() -> Iterator[ObjectStorage]:
    """A server that speaks S3."""
    for needed in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(needed, reason=f"{needed} is missing; install modeling_t3d[dev]")
    server = ObjectStorage()
    yield server
    server.close()


@pytest.fixture
def bucket(storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new bucket there."""
    import s3fs

    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": storage.url}.items():
        monkeypatch.setenv(name, value)
    for name in ELSEWHERE:
        monkeypatch.delenv(name, raising=False)
    name = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
    storage.ask("served")
    return f"s3://{name}"
