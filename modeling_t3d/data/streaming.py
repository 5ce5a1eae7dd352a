# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Batches as a stream: each epoch is one order of the samples, cut between processes and loader workers, and a state
says exactly where it stands. What a sample holds is the data set's affair."""

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

StudySampling = Literal["independent", "together", "one"]
_ORDER, _CHOICE = range(2)  # streams of random numbers
_LOOK_AHEAD = 256  # studies among which one is sought that fits into what is left of a batch


class KeyedSamples(Protocol):
    """A data set that is asked for (epoch, position of the batch, sample), such as [`PretrainingDataset`]."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int, int]) -> Any: ...


@dataclass(frozen=True)
class StreamPlan:
    """
    What decides which sample comes when; a state of one plan means nothing to another.

    Args:
        num_samples (`int`): size of the data set.
        global_batch_size (`int`): samples of a batch over all processes.
        seed (`int`): of the orders.
        shuffle (`bool`): another order in every epoch; otherwise that of the data set.
        study_sampling (`"independent"`, `"together"` or `"one"`): see [`StreamingDataset`].
    """

    num_samples: int
    global_batch_size: int
    seed: int
    shuffle: bool
    study_sampling: StudySampling

    def order(self, epoch: int, studies: Sequence[Hashable]) -> list[int]:
        """The samples of an epoch, each at most once; the same in every process and worker."""
        if self.study_sampling == "independent":
            return self._permutation(epoch, self.num_samples)
        members: dict[Hashable, list[int]] = {}
        for sample, study in enumerate(studies):
            members.setdefault(study, []).append(sample)
        groups = list(members.values())
        groups = [groups[position] for position in self._permutation(epoch, len(groups))]
        if self.study_sampling == "one":
            generator = np.random.default_rng((self.seed, _CHOICE, epoch))
            return [group[int(generator.integers(len(group)))] for group in groups]
        return _packed(groups, self.global_batch_size)

    def _permutation(self, epoch: int, count: int) -> list[int]:
        if not self.shuffle:
            return list(range(count))
        return np.random.default_rng((self.seed, _ORDER, epoch)).permutation(count).tolist()


def _packed(groups: Sequence[list[int]], size: int) -> list[int]:
    """Groups one after another, moved a little so that batches of `size` rarely cut one that fits into a batch."""
    order: list[int] = []
    waiting = deque(groups)
    while waiting:
        room = size - len(order) % size
        fitting = (place for place in range(min(len(waiting), _LOOK_AHEAD)) if len(waiting[place]) <= room)
        place = next(fitting, 0)
        order += waiting[place]
        del waiting[place]
    return order


class StreamingDataset(IterableDataset):
    """
    A stream of batches. All processes and all loader workers follow one order; each takes its own share of it.

    A batch is cut between the processes; whole batches go to loader workers in turn, so that the order does not depend
    on their number. Use it with `DataLoader(..., batch_size=None)`, which need not be prepared by Accelerate, or with
    [`StreamingLoader`], which moves on to the next epoch by itself and whose state fits any number of workers. Other
    loaders start their workers anew for each epoch: call `set_epoch` before it. Inside torchdata's
    `StatefulDataLoader` each worker keeps its own state.

    Args:
        dataset ([`KeyedSamples`]): is asked for (epoch, position of the batch, sample).
        batch_size (`int`): samples per process.
        collator (callable, *optional*): list of samples -> batch; without it batches are lists.
        studies (sequence, *optional*): study of each sample, for `study_sampling`.
        study_sampling (`"independent"`, `"together"` or `"one"`, defaults to `"independent"`):
            Reconstructions of a study come wherever the order puts them; in one batch (unless they are more than it
            holds); or one of them in each epoch, drawn anew.
        num_processes, process_index (`int`): how many share the stream, and which one this is.
        seed (`int`): of the orders.
        shuffle (`bool`, defaults to `True`): another order in every epoch.
        drop_last (`bool`, defaults to `True`):
            Leave out the incomplete batch at the end. Otherwise it is shared as evenly as possible, and left out only
            if it has fewer than `smallest_share` samples for some process.
        smallest_share (`int`, defaults to 1): see `drop_last`; a contrastive loss needs 2.

    Example:

    ```python
    >>> from modeling_t3d.data.streaming import StreamingDataset, StreamingLoader

    >>> class Keys:
    ...     def __len__(self):
    ...         return 6
    ...     def __getitem__(self, key):
    ...         return key
    >>> stream = StreamingDataset(Keys(), 2, shuffle=False)
    >>> next(iter(StreamingLoader(stream)))
    [(0, 0, 0), (0, 0, 1)]

    ```"""

    def __init__(
        self,
        dataset: KeyedSamples,
        batch_size: int,
        collator: Callable[[list[Any]], Any] | None = None,
        *,
        studies: Sequence[Hashable] | None = None,
        study_sampling: StudySampling = "independent",
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        smallest_share: int = 1,
    ) -> None:
        if study_sampling not in ("independent", "together", "one"):
            raise ValueError(f"study_sampling must be 'independent', 'together' or 'one', got {study_sampling!r}")
        if study_sampling != "independent" and (studies is None or len(studies) != len(dataset)):
            raise ValueError(f"study_sampling={study_sampling!r} needs the study of each of {len(dataset)} samples")
        if batch_size < 1 or not 0 <= process_index < num_processes:
            raise ValueError(f"no share for batch_size={batch_size}, process {process_index} of {num_processes}")
        self.dataset = dataset
        self.collator = collator
        self.num_samples = len(dataset)
        self.batch_size = batch_size
        self.studies = studies if studies is not None else ()
        self.plan = StreamPlan(len(dataset), batch_size * num_processes, seed, shuffle, study_sampling)
        self.num_processes = num_processes
        self.process_index = process_index
        self.drop_last = drop_last
        self.smallest_share = smallest_share
        self.epoch = 0
        self.next_batch = 0
        # Of the worker whose own position `next_batch` is; 0 where it is that of the whole stream.
        self._num_workers = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        whole, rest = divmod(self._samples_per_epoch(), self.plan.global_batch_size)
        return whole + (not self.drop_last and rest >= self.smallest_share * self.num_processes)

    @property
    def num_batches(self) -> int:
        """Batches of a whole epoch."""
        return len(self)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the order another one beside seed, data and global batch size."""
        return {"shuffle": self.plan.shuffle, "study_sampling": self.plan.study_sampling}

    def _samples_per_epoch(self) -> int:
        one = self.plan.study_sampling == "one"
        return len(dict.fromkeys(self.studies)) if one else self.plan.num_samples

    def global_size(self, batch: int) -> int:
        """Samples of a batch over all processes."""
        step = self.plan.global_batch_size
        return min(step, self._samples_per_epoch() - batch * step)

    def batches(self, batches_per_epoch: int, num_workers: int = 0, **options: Any) -> Iterator[Any]:
        """From where `seek` went, epoch after epoch, the first so many of each; options of [`StreamingLoader`]."""
        return StreamingLoader(self, num_workers, **options).endless(batches_per_epoch)

    def first_samples(self) -> list[int]:
        """This process's samples of the first batch of all."""
        return self.samples(0, range(1))

    def samples(self, epoch: int, batches: range) -> list[int]:
        """This process's samples of some batches of an epoch."""
        order = self.plan.order(epoch, self.studies)
        return [sample for batch in batches for sample in self._share(order, batch)]

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration start at the beginning of an epoch."""
        self.seek(epoch)

    def seek(self, epoch: int, next_batch: int = 0) -> None:
        """Let the next iteration start at a batch of an epoch."""
        self.epoch, self.next_batch, self._num_workers = epoch, next_batch, 0

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        index, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        if self._num_workers not in (0, stride):
            raise ValueError(
                f"the state is that of one of {self._num_workers} workers, there are {stride} now; resume with as many"
            )
        # Workers of a loader take turns beginning with the first.
        first = self.next_batch + (index if self._num_workers == 0 else 0)
        order = self.plan.order(self.epoch, self.studies)
        for batch in range(first, len(self), stride):
            samples = [self.dataset[(self.epoch, batch, sample)] for sample in self._share(order, batch)]
            # Before the batch is handed over: whoever holds it may ask for the state.
            self.next_batch = batch + stride
            self._num_workers = stride if worker else 0
            yield samples if self.collator is None else self.collator(samples)
        self.seek(self.epoch + 1)

    def _share(self, order: list[int], batch: int) -> list[int]:
        """This process's samples of a batch."""
        size, rank, count = self.plan.global_batch_size, self.process_index, self.num_processes
        members = order[batch * size : (batch + 1) * size]
        return members[len(members) * rank // count : len(members) * (rank + 1) // count]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, for a checkpoint; anything JSON holds."""
        return {
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "num_workers": self._num_workers,
            "plan": asdict(self.plan),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state of the same data, seed and global batch size was taken."""
        for name, value in asdict(self.plan).items():
            if state["plan"][name] != value:
                raise ValueError(
                    f"the stream had {name}={state['plan'][name]!r}, this one has {value!r}; resume with the same"
                )
        self.seek(state["epoch"], state["next_batch"])
        self._num_workers = state["num_workers"]


class StreamingLoader:
    """
    Loader workers over a [`StreamingDataset`] and the position of what was handed out, whatever they have prefetched.

    Iterating gives what is left of the current epoch and moves on to the next one; the state may be loaded with any
    number of workers, and of processes that share the same global batch.

    Args:
        dataset ([`StreamingDataset`]): the stream.
        num_workers (`int`, defaults to 0): processes that read and cut.
        starting (callable): makes a context manager that is entered while workers start.
        options: of `torch.utils.data.DataLoader`, such as `pin_memory` or `prefetch_factor`.
    """

    def __init__(
        self,
        dataset: StreamingDataset,
        num_workers: int = 0,
        starting: Callable[[], AbstractContextManager] = nullcontext,
        **options: Any,
    ) -> None:
        self.dataset = dataset
        self.num_workers = num_workers
        self.starting = starting
        self.options = options
        self._position = dataset.state_dict()

    def __len__(self) -> int:
        """Batches that are left of the current epoch."""
        return len(self.dataset) - self._position["next_batch"]

    def __iter__(self) -> Generator[Any, None, None]:
        self.dataset.load_state_dict(self._position)
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            # A loader draws its workers' seed from the global generator unless it is given one.
            generator=torch.Generator(),
            **self.options,
        )
        position = self._position
        with self.starting():
            batches = iter(loader)
        for batch in batches:
            position = self._position = {**position, "next_batch": position["next_batch"] + 1}
            yield batch
        self._position = {**position, "epoch": position["epoch"] + 1, "next_batch": 0}

    def endless(self, batches_per_epoch: int) -> Generator[Any, None, None]:
        """Epoch after epoch; of each its first `batches_per_epoch` batches. Epochs without any raise `ValueError`."""
        if batches_per_epoch < 1:
            raise ValueError(f"batches_per_epoch must be at least 1, got {batches_per_epoch}")
        stream = self.dataset
        if not len(stream):
            needed, remedy = stream.plan.global_batch_size, "lower batch_size, pass drop_last=False or add samples"
            if not stream.drop_last:
                needed, remedy = stream.smallest_share * stream.num_processes, "use fewer processes or add samples"
            raise ValueError(
                f"an epoch has no batch: its {stream.global_size(0)} samples are fewer than the {needed} that a batch "
                f"of {stream.num_processes} processes takes; {remedy}"
            )
        while True:
            epoch = self._position["epoch"]
            with closing(iter(self)) as batches:
                yield from islice(batches, max(0, batches_per_epoch - self._position["next_batch"]))
            self._position = {**self._position, "epoch": epoch + 1, "next_batch": 0}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: every batch that was handed out is over."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch that was handed out before the state was taken."""
        self.dataset.load_state_dict(state)
        self._position = dict(state)


def _unchanged(batch: Any) -> Any:
    return batch


__all__ = ["StreamPlan", "StreamingDataset", "StreamingLoader", "StudySampling"]
