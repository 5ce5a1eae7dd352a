# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A stream gives each sample once, in an order that neither workers nor processes nor interruptions change."""

import json

import numpy as np
import pytest
import torch
from counting_file_system import CountingFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modeling_t3d.data.datasets import PretrainingCollator, PretrainingDataset
from modeling_t3d.data.manifest import ManifestRow
from modeling_t3d.data.phantom_reports import train_phantom_tokenizer
from modeling_t3d.data.store import VolumeStore
from modeling_t3d.data.streaming import StreamingDataset, StreamingLoader
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.processing_t3d import T3DProcessor


class Keys:
    """Gives what it is asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key):
        return key


def samples(batches) -> list[int]:
    return [key[2] for batch in batches for key in batch]


def study_numbers(draw_sizes: list[int]) -> list[int]:
    """Study of each sample, interleaved, from the sizes of the studies."""
    return [study for turn in range(max(draw_sizes)) for study, size in enumerate(draw_sizes) if turn < size]


# ---------------------------------------------------------------------------------------------- order


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 7),
    num_processes=st.integers(1, 4),
    seed=st.integers(0, 9),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_each_sample_comes_once(count, batch_size, num_processes, seed, drop_last, epoch):
    shares = []
    for rank in range(num_processes):
        stream = StreamingDataset(
            Keys(count),
            batch_size,
            num_processes=num_processes,
            process_index=rank,
            seed=seed,
            drop_last=drop_last,
        )
        stream.set_epoch(epoch)
        batches = list(stream)
        assert len(batches) == len(stream)
        assert stream.epoch == epoch + 1
        assert [key[:2] for batch in batches for key in batch] == [
            (epoch, number) for number, batch in enumerate(batches) for _ in batch
        ]
        shares.append(batches)
    seen = [sample for batches in shares for sample in samples(batches)]
    assert len(seen) == len(set(seen))
    left_out = count - len(seen)
    assert 0 <= left_out < (batch_size * num_processes if drop_last else num_processes)
    # The same global batches for any number of processes that shares them.
    alone = StreamingDataset(Keys(count), batch_size * num_processes, seed=seed, drop_last=drop_last)
    alone.set_epoch(epoch)
    merged = [[key for batches in shares for key in batches[number]] for number in range(len(shares[0]))]
    assert merged == list(alone)[: len(merged)]


def test_every_epoch_has_an_order_of_its_own():
    stream = StreamingDataset(Keys(50), 10, seed=1)
    first, second = samples(stream), samples(stream)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(50))
    again = StreamingDataset(Keys(50), 10, seed=1)
    again.set_epoch(1)
    assert samples(again) == second
    assert samples(StreamingDataset(Keys(50), 10, seed=2)) != first
    assert samples(StreamingDataset(Keys(50), 10, shuffle=False)) == list(range(50))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=25), seed=st.integers(0, 5), extra=st.integers(0, 6))
def test_reconstructions_of_a_study_come_together(sizes, seed, extra):
    studies, size = study_numbers(sizes), 4 + extra
    stream = StreamingDataset(
        Keys(len(studies)), size, studies=studies, study_sampling="together", seed=seed, drop_last=False
    )
    batches = [[key[2] for key in batch] for batch in stream]
    order = [sample for batch in batches for sample in batch]
    assert sorted(order) == list(range(len(studies)))
    runs = [studies[sample] for sample in order]
    places = {study: [place for place, run in enumerate(runs) if run == study] for study in runs}
    assert all(where == list(range(where[0], where[-1] + 1)) for where in places.values()), "members follow each other"
    for study, where in places.items():
        if where[0] // size != where[-1] // size:
            room = size - where[0] % size
            later = [len(other) for other in places.values() if other[0] > where[0]]
            assert len(where) > room, study
            assert all(count > room for count in later), "a study is cut only where none that is left fits"


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=25), seed=st.integers(0, 5))
def test_one_reconstruction_per_study(sizes, seed):
    studies = study_numbers(sizes)
    stream = StreamingDataset(Keys(len(studies)), 3, studies=studies, study_sampling="one", seed=seed, drop_last=False)
    drawn = [samples(stream) for _ in range(40)]
    for epoch in drawn:
        assert sorted(studies[sample] for sample in epoch) == list(range(len(sizes)))
    if max(sizes) > 1:
        assert len({tuple(sorted(epoch)) for epoch in drawn}) > 1, "another one in other epochs"


# ---------------------------------------------------------------------------------------------- workers and resumption


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_order_is_the_same_for_any_number_of_workers():
    expected = list(StreamingDataset(Keys(23), 2, seed=3))
    for num_workers in (1, 2, 3):
        loader = StreamingLoader(StreamingDataset(Keys(23), 2, seed=3), num_workers)
        assert list(loader) == expected
        stream = StreamingDataset(Keys(23), 2, seed=3)
        assert samples(DataLoader(stream, batch_size=None, num_workers=num_workers)) == samples(expected)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(4, 40),
    batch_size=st.integers(1, 4),
    stops=st.lists(st.integers(0, 15), max_size=4),
    study_sampling=st.sampled_from(["independent", "together", "one"]),
)
def test_a_resumed_stream_sees_each_sample_once(count, batch_size, stops, study_sampling):
    """Interrupted anywhere, any number of times, over several epochs."""
    studies = [sample // 2 for sample in range(count)]

    def fresh() -> StreamingLoader:
        stream = StreamingDataset(Keys(count), batch_size, studies=studies, study_sampling=study_sampling, seed=5)
        return StreamingLoader(stream)

    def run(loader: StreamingLoader, limit: int) -> list:
        batches = []
        while len(batches) < limit and len(loader.dataset):
            for batch in loader:
                batches.append(batch)
                if len(batches) == limit:
                    break
        return batches

    if not len(fresh().dataset):
        return
    expected, seen, loader = run(fresh(), sum(stops) + 9), [], fresh()
    for stop in [*stops, 9]:
        seen += run(loader, stop)
        state = json.loads(json.dumps(loader.state_dict()))
        loader = fresh()
        loader.load_state_dict(state)
    assert seen == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 3)])
def test_a_stream_resumes_with_other_workers(before, after):
    expected = list(StreamingDataset(Keys(30), 2, seed=3))
    loader = StreamingLoader(
        StreamingDataset(Keys(30), 2, seed=3), before, **({"prefetch_factor": 4} if before else {})
    )
    batches = iter(loader)
    seen = [next(batches) for _ in range(5)]
    state = loader.state_dict()
    del batches
    loader = StreamingLoader(StreamingDataset(Keys(30), 2, seed=3), after)
    loader.load_state_dict(state)
    assert len(loader) == 10
    assert seen + list(loader) == expected


def test_a_stream_resumes_with_other_processes():
    """The same global batch of 6, first on three processes, then on two."""

    def streams(num_processes: int) -> list[StreamingDataset]:
        return [
            StreamingDataset(Keys(30), 6 // num_processes, num_processes=num_processes, process_index=rank, seed=3)
            for rank in range(num_processes)
        ]

    def step(iterators) -> list:
        return [key for iterator in iterators for key in next(iterator)]

    first = streams(3)
    iterators = [iter(stream) for stream in first]
    seen = [step(iterators) for _ in range(2)]
    state = first[1].state_dict()
    later = streams(2)
    for stream in later:
        stream.load_state_dict(state)
    iterators = [iter(stream) for stream in later]
    assert seen + [step(iterators) for _ in range(3)] == list(StreamingDataset(Keys(30), 6, seed=3))


def test_states_and_settings_that_do_not_fit_are_refused():
    state = StreamingDataset(Keys(10), 2).state_dict()
    with pytest.raises(ValueError, match="the stream had num_samples=10, this one has 11"):
        StreamingDataset(Keys(11), 2).load_state_dict(state)
    with pytest.raises(ValueError, match="the stream had seed=0, this one has 1"):
        StreamingDataset(Keys(10), 2, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="needs the study of each of 10 samples"):
        StreamingDataset(Keys(10), 2, study_sampling="one", studies=[1, 2])
    with pytest.raises(ValueError, match="study_sampling must be"):
        StreamingDataset(Keys(10), 2, study_sampling="both")
    stream = StreamingDataset(Keys(10), 2)
    stream.load_state_dict({**state, "num_workers": 3})
    with pytest.raises(ValueError, match="one of 3 workers, there are 1 now"):
        next(iter(stream))


def test_epochs_without_a_batch_are_refused():
    """An endless stream of them would never give anything."""
    with pytest.raises(ValueError, match=r"no batch: its 3 samples are fewer than the 8 .* 2 processes .*lower batch"):
        next(StreamingDataset(Keys(3), 4, num_processes=2).batches(1))
    few = StreamingDataset(Keys(3), 4, num_processes=2, drop_last=False, smallest_share=2)
    with pytest.raises(ValueError, match=r"its 3 samples are fewer than the 4 .* use fewer processes"):
        next(few.batches(1))
    one_study = StreamingDataset(Keys(4), 2, studies=[0] * 4, study_sampling="one")
    with pytest.raises(ValueError, match="its 1 samples are fewer than the 2 "):
        next(StreamingLoader(one_study).endless(1))
    with pytest.raises(ValueError, match="batches_per_epoch must be at least 1, got 0"):
        next(StreamingDataset(Keys(8), 4).batches(0))


def worker_state(batch) -> tuple:
    """The batch, and where its worker stands."""
    return [key[2] for key in batch], torch.utils.data.get_worker_info().dataset.state_dict()


def test_workers_keep_states_of_their_own():
    """As torchdata's StatefulDataLoader has it: each worker's state goes back to the same worker."""

    def load(states=None) -> list:
        stream = StreamingDataset(Keys(24), 2, collator=worker_state, seed=6)

        def restore(worker: int) -> None:
            if states:
                torch.utils.data.get_worker_info().dataset.load_state_dict(states[worker])

        return list(DataLoader(stream, batch_size=None, num_workers=2, worker_init_fn=restore))

    whole = load()
    before = whole[:6]
    states = [before[-2][1], before[-1][1]]  # six batches: each worker has given three
    assert {state["num_workers"] for state in states} == {2}
    assert [batch for batch, _ in before + load(states)] == [batch for batch, _ in whole]


# ---------------------------------------------------------------------------------------------- on a store

REPORTS = ["The heart is of normal size.", "No effusion.", "A nodule of 8 mm.", "The spleen is normal."]


@pytest.fixture(scope="module")
def pretraining():
    """Four volumes in object storage, without source files."""
    processor = T3DImageProcessor(
        spacing=(3, 3, 3), global_size=(16, 16, 16), local_size=(16, 32, 32), num_local_views=3
    )
    store = VolumeStore.create("counting://streamed", processor, tile=(16, 32, 32))
    rows = []
    for number, report in enumerate(REPORTS):
        scan = np.full((128, 192, 192), -1000, dtype=np.int16)
        scan[:, 20:170, 20:170] = 40 + np.random.default_rng(number).integers(-30, 30, (128, 150, 150))
        store.add(f"{number:040x}", processor.prepare(scan, volume_spacing=(3, 3, 3), volume_axes="SAR"))
        rows.append(ManifestRow(number + 1, f"{number}.nii.gz", report, "p", f"s{number // 2}", key=f"{number:040x}"))
    dataset = PretrainingDataset(rows, processor, store="counting://streamed", keep_global_views=True)
    return dataset, PretrainingCollator(T3DProcessor(processor, train_phantom_tokenizer(REPORTS, 120)))


def test_batches_of_a_stream_are_those_of_the_data_set(pretraining):
    dataset, collator = pretraining
    stream = StreamingDataset(dataset, 2, collator, seed=4)
    order = stream.plan.order(0, ())
    for number, batch in enumerate(stream):
        expected = collator([dataset[(0, number, sample)] for sample in order[2 * number : 2 * number + 2]])
        assert batch["local_pixel_values"].shape == (2, 3, 1, 16, 32, 32)
        for name, value in expected.items():
            assert torch.equal(batch[name], value), name
    studies = [row.study_id for row in dataset.rows]
    together = StreamingDataset(dataset, 2, collator, studies=studies, study_sampling="together", seed=4)
    assert all(batch["study_ids"][0] == batch["study_ids"][1] for batch in together)


def test_an_item_reads_its_crops_and_not_the_volume(pretraining):
    dataset, collator = pretraining
    collator([dataset[(0, 0, 0)]])  # keeps the global view
    CountingFileSystem.reads.clear()
    batch = collator([dataset[(1, 0, 0)]])
    assert batch["local_mask"].sum() == 3
    voxels = [entry for entry in CountingFileSystem.reads if "/volumes/" in entry[0]]
    num_bytes = sum(length for _, _, length in voxels)
    tile, volume = 16 * 32 * 32 * 2, 128 * 192 * 192 * 2
    assert num_bytes <= 3 * 2 * 2 * 2 * tile + (1 << 16), "at most eight tiles for each view, and the header"
    assert num_bytes < 0.12 * volume
