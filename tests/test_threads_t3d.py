# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Tasks side by side, each on one thread of torch's, and nothing of it left behind."""

import threading

import pytest
import torch

from modeling_t3d.threads_t3d import run_single_threaded


def test_every_task_runs_in_a_thread_of_its_own_on_one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen, all_there = [], threading.Barrier(2, timeout=60)

        def task():
            all_there.wait()  # neither ends before both have begun
            seen.append((threading.get_ident(), torch.get_num_threads()))

        run_single_threaded([task, task])
        assert [number for _, number in seen] == [1, 1]
        assert len({threading.get_ident(), *(thread for thread, _ in seen)}) == 3
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_of_a_task_is_raised_and_the_setting_put_back():
    def task():
        raise ValueError("of the task")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="of the task"):
        run_single_threaded([task])
    assert torch.get_num_threads() == before
