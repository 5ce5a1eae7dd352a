# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Benchmarks, with their measurements left out or tiny: where they write, and what they compare."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# What measures in each script; it is left out here.
MEASUREMENTS = {
    "inference": ("new_model", "measure"),
    "memory": ("memory_rows", "alignment_rows"),
    "tiling": ("plan_rows", "grid_rows", "peer_rows", "reassembly_rows"),
    "training": ("overhead_rows", "format_rows", "data_wait_rows"),
}


@pytest.fixture
def load(monkeypatch):
    """Imports a script as `python benchmarks/NAME.py` would, with these command-line arguments."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def imported(name, *arguments):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        return importlib.import_module(name)

    return imported


@pytest.fixture
def written(monkeypatch):
    """The files that are written; none really is."""
    paths = []
    monkeypatch.setattr(Path, "write_text", lambda path, text, **kwargs: paths.append(path))
    return paths


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_page_is_written_only_where_asked(name, load, written, monkeypatch, capsys):
    threads = torch.get_num_threads()
    for arguments, expected in (((), []), (("--output", "page.md"), [Path("page.md")])):
        script = load(name, *arguments)
        for function in MEASUREMENTS[name]:
            monkeypatch.setattr(script, function, lambda *args: [])
        script.main()
        assert capsys.readouterr().out.startswith("# ")
        assert written == expected
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("arguments", [(), ("--output", "page.md"), ("--output", "page.md", "--device", "cpu")])
def test_without_a_gpu_no_page_of_one_is_written(arguments, load, written, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script = load("gpu", *arguments)
    monkeypatch.setattr(script, "measure", lambda *args: [])
    with pytest.raises(SystemExit, match=r"\Aerror: nothing is measured on a CUDA GPU.*\Z"):
        script.main()
    assert not written
