# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Fills a store of prepared volumes from the rows of a manifest, on Dask: in this machine or on a running cluster.

Machines share nothing but the store's address (and that of the volumes). Every volume is one task that may run twice
or be cut off anywhere; Dask gives the tasks of a worker that died to others, and a second call does what is left.
"""

import csv
import io
import logging
import math
import os
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .build_tasks import (
    PreparationOutcome,
    PreparationTask,
    RemoteSource,
    bundled,
    is_remote,
    run_task,
    run_tasks,
)
from .manifest import ManifestRow, parse_row
from .manifest_files import read_records, relative_to, write_records
from .store import VolumeStore

logger = logging.getLogger(__name__)

_CONNECT = 30  # seconds until a scheduler that does not answer is an error
_WAIT_FOR_WORKERS = 300  # seconds until a cluster without workers is an error
_REFRESH = 5.0  # seconds between two looks at how many workers there are
_TELL_EVERY = 60.0  # seconds between two lines of a log that shows no bar
_SIZING_THREADS = 16  # that ask for sizes: in object storage each answer is a round trip, and there may be many
_BUNDLES_PER_THREAD = 4  # at least, however small the volumes are: the last ones to finish are few
_RETRIES = 2  # of a task that failed through no fault of its volume, such as a lost connection to the store


class BuildError(RuntimeError):
    """A store that could not be filled; what was stored stays, and the message says what to do next."""


@dataclass
class BuildReport:
    """
    What a build did.

    Args:
        keys (`dict[int, str]`): row number -> key of its volume in the store.
        num_added, num_present (`int`): volumes prepared now, and those that the store had.
        unreadable (`list[PreparationOutcome]`): quarantined volumes, by row.
        warnings (`Counter[str]`): how many volumes came with each warning of the preparation.
        seconds (`float`): from first to last.
    """

    keys: dict[int, str] = field(default_factory=dict)
    num_added: int = 0
    num_present: int = 0
    unreadable: list[PreparationOutcome] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def count(self, outcome: PreparationOutcome) -> None:
        """Enter one outcome."""
        if outcome.key is None:
            self.unreadable.append(outcome)
            self.unreadable.sort(key=lambda one: one.task.number)
            return
        self.keys[outcome.task.number] = outcome.key
        self.num_added += outcome.state == "added"
        self.num_present += outcome.state == "present"
        self.warnings.update(outcome.warnings)

    def describe(self) -> str:
        """One fact per line."""
        lines = [
            f"{len(self.keys)} volumes are in the store: {self.num_added} prepared now, {self.num_present} before, "
            f"in {self.seconds:.0f} s",
            f"{len(self.unreadable)} volumes could not be read and are quarantined",
        ]
        return "\n".join([*lines, *(f"{count} volumes: {text}" for text, count in self.warnings.most_common())])


def build_store(
    rows: Sequence[ManifestRow],
    url: str | Path,
    image_processor: Any,
    *,
    scheduler: str | None = None,
    num_workers: int | None = None,
    addresses: Mapping[int, str] | None = None,
    codec: str = "none",
    storage_options: dict[str, Any] | None = None,
    max_unreadable: int | float = 0.01,
    quarantine: str | Path | None = None,
    on_outcome: Callable[[PreparationOutcome], None] | None = None,
) -> BuildReport:
    """
    Prepare the volumes of a manifest into a store; those it has are kept.

    The largest volumes are begun first, so that no long one is left to the end. A volume that cannot be read is
    quarantined: counted, listed in a file with its reason, and too many of them stop the build.

    Args:
        rows (sequence of [`ManifestRow`]): the volumes.
        url (`str` or `Path`): of the store, made if absent: the one place that all workers must reach.
        image_processor (`T3DImageProcessor`): prepares the volumes.
        scheduler (`str`, *optional*):
            Address of a running Dask scheduler, such as `"tcp://head:8786"`, whose workers have this package.
        num_workers (`int`, *optional*): processes on this machine without `scheduler`; its cores by default, and 0
            does the work in this process, without Dask.
        addresses (mapping `int` -> `str`, *optional*):
            Row number -> where workers fetch the volume from; by default its path, which they must all reach then.
        codec (`str`): of a store that is made; see [`VolumeStore`].
        storage_options (`dict`, *optional*): what fsspec needs beside the address of the store, and beside those of
            volumes that begin alike (`s3://`); workers get it too.
        max_unreadable (`int` or `float`, defaults to 0.01): how many volumes, or which share, may be quarantined; of a
            share above 0 at least one.
        quarantine (`str` or `Path`, *optional*): CSV file (row, volume, reason) of those volumes, written always.
        on_outcome (callable, *optional*): told every [`PreparationOutcome`], as it comes.

    Raises:
        BuildError: too many volumes could not be read, or the cluster or the store failed.
    """
    begun = time.monotonic()
    store = VolumeStore.create(url, image_processor, codec=codec, storage_options=storage_options)
    tasks = _sized_tasks(rows, store, addresses or {})
    tasks.sort(key=lambda task: (-task.size, task.number))
    limit = max_unreadable if isinstance(max_unreadable, int) else math.ceil(max_unreadable * len(tasks))
    report = BuildReport()
    work = _here if num_workers == 0 and scheduler is None else _on_dask
    try:
        for outcome in _shown(work(tasks, store, image_processor, scheduler, num_workers), tasks):
            report.count(outcome)
            if outcome.key is None:
                logger.warning("row %d is quarantined: %s", outcome.task.number, outcome.reason)
            if on_outcome is not None:
                on_outcome(outcome)
            if len(report.unreadable) > limit:
                raise BuildError(_too_many(report.unreadable, len(tasks), limit))
    finally:
        report.seconds = time.monotonic() - begun
        if quarantine is not None:
            _write_quarantine(Path(quarantine), report.unreadable)
    logger.info("%s", report.describe())
    return report


def _sized_tasks(
    rows: Sequence[ManifestRow], store: VolumeStore, addresses: Mapping[int, str]
) -> list[PreparationTask]:
    """A task for each row, in their order, with a bar, or lines in a log."""
    sources = [addresses.get(row.number, str(row.volume)) for row in rows]
    tasks: list[PreparationTask] = []
    told = time.monotonic()
    with (
        ThreadPoolExecutor(_SIZING_THREADS) as pool,
        tqdm(total=len(rows), unit="volume", desc="sizing volumes", disable=None) as bar,
    ):
        sizes = pool.map(lambda source: _size(source, store), sources)
        for row, source, size in zip(rows, sources, sizes, strict=True):
            tasks.append(PreparationTask(row.number, source, row.rescale, size))
            bar.update()
            if bar.disable and time.monotonic() - told > _TELL_EVERY:
                told = time.monotonic()
                logger.info("the sizes of %d/%d volumes are known", len(tasks), len(rows))
    return tasks


def _size(source: str, store: VolumeStore) -> int:
    """Bytes of a file or folder; 0 where there is nothing, which the worker will say."""
    try:
        if is_remote(source):
            return RemoteSource(source, store).size()
        if os.path.isdir(source):
            return sum(file.stat().st_size for file in Path(source).rglob("*") if file.is_file())
        return os.stat(source).st_size
    except OSError:
        return 0


def _here(
    tasks: list[PreparationTask], store: VolumeStore, image_processor: Any, *_: Any
) -> Iterator[PreparationOutcome]:
    """The work in this process."""
    for task in tasks:
        yield run_task(task, store, image_processor)


def _on_dask(
    tasks: list[PreparationTask],
    store: VolumeStore,
    image_processor: Any,
    scheduler: str | None,
    num_workers: int | None,
) -> Iterator[PreparationOutcome]:
    """
    Outcomes as they come. Two bundles per thread are under way, so that the order of the sizes is kept. The tasks of
    one whose workers died come last and one by one, with nothing beside them, so that the culprit alone is given up.
    """
    with _connected(scheduler, num_workers) as (client, distributed):
        done = distributed.as_completed()
        num_threads = max(1, sum(client.nthreads().values()))
        waiting = deque(bundled(tasks, math.ceil(len(tasks) / (_BUNDLES_PER_THREAD * num_threads))))
        under_way: dict[Any, list[PreparationTask]] = {}
        suspects: deque[PreparationTask] = deque()
        wanted = looked = 0.0

        def submit() -> None:
            nonlocal wanted, looked
            if time.monotonic() - looked > _REFRESH:  # a cluster may grow, and its workers may die
                wanted, looked = max(2, 2 * sum(client.nthreads().values())), time.monotonic()
            if suspects and not waiting and not under_way:
                waiting.append([suspects.popleft()])
            while len(under_way) < wanted and waiting:
                bundle = waiting.popleft()
                key = f"prepare-{bundle[0].number}-{uuid.uuid4().hex}"
                future = client.submit(
                    run_tasks, bundle, store, image_processor, key=key, pure=False, retries=_RETRIES
                )
                under_way[future] = bundle
                done.add(future)

        submit()
        for future in done:
            bundle = under_way.pop(future)
            if len(bundle) > 1 and isinstance(future.exception(), distributed.KilledWorker):
                suspects.extend(bundle)
            else:
                yield from _outcomes(future, bundle, distributed)
            submit()


def _outcomes(future: Any, bundle: list[PreparationTask], distributed: Any) -> list[PreparationOutcome]:
    error = future.exception()
    if error is None:
        return future.result()
    task, *others = bundle
    if isinstance(error, distributed.KilledWorker):
        reason = "every worker that prepared it died, for lack of memory most likely; give the workers more"
        return [PreparationOutcome(task, "unreadable", reason=f"{task.source}: {reason}")]
    rows = f"row {task.number}" + (f" or one of the {len(others)} begun after it" if others else "")
    raise BuildError(
        f"{rows}: {type(error).__name__}: {error}; mend the store or the cluster and call again, what was stored is "
        "kept"
    ) from error


@contextmanager
def _connected(scheduler: str | None, num_workers: int | None) -> Iterator[tuple[Any, Any]]:
    """A client of a running cluster, or of one that lives in this machine as long as the build."""
    try:
        import distributed
    except ImportError:
        raise BuildError(
            'a build on several processes needs Dask; install it with pip install "modeling_t3d[cluster]", or pass '
            "num_workers=0"
        ) from None
    if scheduler is not None:
        try:
            client = distributed.Client(scheduler, timeout=_CONNECT)
        except (OSError, TimeoutError) as error:
            raise BuildError(
                f"{scheduler}: no Dask scheduler answers ({type(error).__name__}); start one there"
            ) from None
        with client:
            try:
                client.wait_for_workers(1, timeout=_WAIT_FOR_WORKERS)
            except TimeoutError:
                raise BuildError(f"{scheduler}: the scheduler has no workers; start some with dask worker") from None
            yield client, distributed
        return
    with (
        # What Dask writes beside the store goes with the build.
        tempfile.TemporaryDirectory(prefix="modeling_t3d-") as folder,
        distributed.LocalCluster(
            n_workers=num_workers or os.cpu_count() or 1,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            local_directory=folder,
            silence_logs=logging.ERROR,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client, distributed


def _shown(outcomes: Iterator[PreparationOutcome], tasks: list[PreparationTask]) -> Iterator[PreparationOutcome]:
    """The same outcomes, with a bar, or lines in a log, by bytes: volumes differ in size by a factor of a hundred."""
    total = sum(task.size for task in tasks)
    count = unreadable = done = 0
    begun = told = time.monotonic()
    with tqdm(total=total, unit="B", unit_scale=True, desc="preparing volumes", disable=None) as bar:
        for outcome in outcomes:
            count += 1
            unreadable += outcome.key is None
            bar.set_postfix_str(f"{count}/{len(tasks)} volumes, {unreadable} quarantined", refresh=False)
            bar.update(outcome.task.size)
            done += outcome.task.size
            if bar.disable and time.monotonic() - told > _TELL_EVERY:
                told = time.monotonic()
                left = (told - begun) * (total - done) / max(done, 1) / 60
                logger.info(
                    "%d/%d volumes, %.1f of %.1f GB, %d quarantined, about %.0f minutes left",
                    count, len(tasks), done / 1e9, total / 1e9, unreadable, left,
                )  # fmt: skip
            yield outcome


def _too_many(unreadable: list[PreparationOutcome], count: int, limit: int) -> str:
    first = "; ".join(f"row {one.task.number}: {one.reason}" for one in unreadable[:3])
    return (
        f"{len(unreadable)} of {count} volumes could not be read, max_unreadable allows {limit} ({first}); mend or "
        "remove them, or allow more; what was stored is kept"
    )


def _write_quarantine(path: Path, unreadable: list[PreparationOutcome]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["row", "volume", "reason"])
    writer.writerows([one.task.number, one.task.source, one.reason] for one in unreadable)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.temporary")
    temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    os.replace(temporary, path)


def addresses_below(manifest: str | Path, rows: Sequence[ManifestRow], root: str) -> dict[int, str]:
    """
    Where the volumes of a manifest lie in object storage, if its whole folder lies there.

    Args:
        manifest (`str` or `Path`): the manifest.
        rows (sequence of [`ManifestRow`]): its rows.
        root (`str`): address of a copy of the manifest's folder, such as `"s3://bucket/ct-rate"`.
    """
    found = {}
    for row in rows:
        inside = relative_to(row.volume, Path(manifest).parent)
        if os.path.isabs(inside):
            raise BuildError(
                f"{manifest}: row {row.number}: its volume does not lie below the manifest's folder, so that its "
                f"place below {root} is not known; name it by a relative path"
            )
        found[row.number] = f"{root.rstrip('/')}/{inside}"
    return found


def write_stored_manifest(manifest: str | Path, report: BuildReport, path: str | Path) -> int:
    """
    The rows of a manifest whose volumes are in a store, each naming its volume by key: what training on a machine
    without the source files reads.

    Left out are `rescale`, which the stored volume has been through, and `masks`: they are no part of the store,
    training opens none, and a manifest whose masks are missing is refused. What needs them, such as captions and the
    evaluation by lesions and organs, reads the manifest of the sources.

    Args:
        manifest (`str` or `Path`): the manifest that the store was built from.
        report ([`BuildReport`]): of the build.
        path (`str` or `Path`): to write.

    Returns:
        How many rows hold the very volume of an earlier row and were left out (`int`).
    """
    first: dict[str, ManifestRow] = {}
    records = []
    repeated = 0
    for number, record in read_records(manifest)[0]:
        key = report.keys.get(number)
        if key is None:
            continue
        row = parse_row(Path(manifest), number, record)
        earlier = first.setdefault(key, row)
        if earlier.split != row.split:
            raise BuildError(
                f"{manifest}: rows {earlier.number} ({earlier.split!r}) and {number} ({row.split!r}) hold the same "
                "volume, which would be trained on and scored; remove one and call again, what was stored is kept"
            )
        if earlier is not row:
            repeated += 1
            continue
        kept = {name: value for name, value in record.items() if name not in ("rescale", "masks")}
        records.append(kept | {"volume": key, "key": key})
    write_records(records, path)
    return repeated


__all__ = ["BuildError", "BuildReport", "addresses_below", "build_store", "write_stored_manifest"]
