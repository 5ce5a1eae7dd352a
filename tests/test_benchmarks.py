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
    "phantom_generation": ("generation_rows",),
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


def test_peers_take_turns_and_warm_up_does_not_count(load, monkeypatch):
    measuring, calls, clock = load("measuring"), [], [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        calls.append(name)
        clock[0] += 100 if len(calls) < 3 else seconds  # the first round is slow

    found = measuring.medians({"a": lambda: work("a", 2), "b": lambda: work("b", 3)}, repetitions=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert found == {"a": 2, "b": 3}


def tiny_sizes(gpu):
    return gpu.Sizes(
        **{"preset": "tiny", "view": 16, "views": 2, "pairs": 4, "cached_pairs": 5, "scan": (8, 16, 16)},
        **{"matrix": 16, "copied": 1 << 10, "repetitions": 1},
    )


def test_without_a_gpu_the_page_says_what_is_to_be_measured(load, written, capsys):
    gpu = load("gpu", "--targets-only", "--output", "page.md")
    gpu.main()
    page = capsys.readouterr().out
    assert written == [Path("page.md")]
    assert page.count("| not measured |") == len(gpu.target_rows(gpu.Sizes(), {})) - 2
    assert "| peak with gradient caching, 4,096 x (1 global + 4 local) views as one batch | <= 80 GiB |" in page


def test_every_target_of_a_gpu_is_measured(load):
    gpu = load("gpu")
    processor = gpu.T3DImageProcessor(global_size=(16, 16, 16), local_size=(8, 8, 8))
    page = gpu.measure(tiny_sizes(gpu), torch.device("cpu"), processor)
    assert page[: len(gpu.target_rows(tiny_sizes(gpu), {}))][-1].startswith("| torch, cuDNN |")
    assert not [line for line in page if gpu.NOT_MEASURED in line]


def test_cached_pairs_are_made_as_they_are_encoded_and_the_same_both_times(load, monkeypatch):
    gpu = load("gpu")
    sizes, made = tiny_sizes(gpu), []
    make = gpu.pretraining_batch

    def spied(*arguments):
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(gpu, "pretraining_batch", spied)
    processor = gpu.T3DImageProcessor(global_size=(16, 16, 16), local_size=(8, 8, 8))
    model = gpu.T3DForPreTraining(gpu.T3DConfig.from_preset("tiny"))
    gpu.cached_step(model, sizes, processor, 2)
    assert [batch["study_ids"].tolist() for batch in made] == [[0, 1], [2, 3], [4]] * 2
    for first, second in zip(made[:3], made[3:], strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(made[0]["pixel_values"], made[1]["pixel_values"])


def test_the_encoder_is_timed_in_turn_with_the_network_whose_weights_it_has(load, monkeypatch):
    gpu = load("gpu")
    timed = {}

    def spied(peers, repetitions, device, warm_up):
        timed.update(peers)
        return dict.fromkeys(peers, 0.5)

    monkeypatch.setattr(gpu, "device_limits", lambda *args: (1e9, 1e9))
    monkeypatch.setattr(gpu, "medians", spied)
    rows, _ = gpu.encoder_rows(tiny_sizes(gpu), torch.device("cpu"))
    same, others = gpu.encoders("tiny")
    assert list(timed) == [*same, *others]
    assert [row.split("|")[3].strip() for row in rows[2:7]] == ["1.00", "1.00", "1.00", "", ""]
    for model in same.values():
        assert any(isinstance(module, torch.nn.BatchNorm3d) for module in model.modules())
    theirs = same[gpu.MONAI].state_dict()
    ours = same["T3D, batch norm, channels-last 3D"].encoder.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_an_encoder_that_differs_is_not_timed(load):
    gpu = load("gpu")
    same, _ = gpu.encoders("tiny")
    views = torch.randn(2, 1, 16, 16, 16)
    assert gpu.largest_difference(same, views) <= 1e-9
    with torch.no_grad():
        same["T3D, batch norm, contiguous"].encoder.layer2[0].bn1.weight += 1e-3
    with pytest.raises(SystemExit, match=r"error: T3D, batch norm, contiguous differs from MONAI"):
        gpu.largest_difference(same, views)
