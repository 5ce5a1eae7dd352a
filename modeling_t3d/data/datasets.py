# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""From manifest rows to the batches that [`T3DForPreTraining`] takes. Random views and texts depend on (seed, epoch,
batch, index) alone, so that resuming, evaluating or adding loader processes changes none of them."""

import copy
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..geometry_t3d import VolumeError
from ..image_settings_t3d import LOADER_ARGUMENTS
from ..prepared_volume_t3d import PreparedVolume
from ..tile_plan_t3d import aligned_positions
from ..volume_transforms_t3d import whole_volume_mask
from .build_tasks import rescaled_key
from .manifest import ManifestRow
from .source_hashes import preparation_text
from .sources import open_source
from .store import StoreError, VolumeStore
from .texts import sample_sentences, stable_id
from .token_cache import TokenCache

logger = logging.getLogger(__name__)

# Streams of random numbers: one part of a sample can change without moving the draws of another.
_VIEWS, _ALIGNED, _SENTENCES = range(3)
_CORRUPTION = 6  # those between belong to augmentation, perturbation and texts
_KEPT_IN_MEMORY = 256 << 20  # bytes of global views that a process need not read from the store again


@dataclass
class PretrainingSample:
    """
    One item of a [`PretrainingDataset`].

    Args:
        prepared (`PreparedVolume`): what views are cut from.
        text (`str`): the report.
        study_id, report_id (`int`): equal ones are not negatives of each other.
        view_seed (`tuple[int, ...]`): seeds the places of this sample's views.
        batch_seed (`tuple[int, ...]`): seeds what the views of a batch share; equal on all processes.
        global_values (`torch.Tensor` of shape `(depth, height, width)`, *optional*):
            The global view before windows, where it was kept.
        sentences (`tuple[str, ...]`): further texts, each a few sentences of the report.
    """

    prepared: PreparedVolume
    text: str
    study_id: int
    report_id: int
    view_seed: tuple[int, ...]
    batch_seed: tuple[int, ...]
    global_values: torch.Tensor | None = None
    sentences: tuple[str, ...] = ()


class PretrainingDataset(Dataset):
    """
    Volumes with reports. A volume is prepared once and kept on disk; a failing one raises and names its file.

    Args:
        rows (`list[ManifestRow]`): of one split; see [`~modeling_t3d.data.manifest.read_manifest`].
        image_processor (`T3DImageProcessor`): prepares volumes and later cuts views.
        cache_dir (`str` or `Path`, *optional*):
            Keeps prepared volumes in a [`VolumeStore`] of each preparation; without it they are prepared at every
            access.
        store ([`VolumeStore`], `str` or `Path`, *optional*):
            In place of `cache_dir`, one store or its address. Rows with a key need no source file.
        keep_global_views (`bool`, defaults to `False`):
            Keep the global views in the store as well, HU rounded to whole numbers [choice]: an item then reads
            these and its crops, and never a whole volume.
        seed (`int`, defaults to 0): of views and sentences.
        num_sentence_texts (`int`, defaults to 0):
            Further texts that a volume comes with, each one to three sentences of its whole report, others in every
            epoch [choice]. A zero-shot classifier's prompts are single sentences, and a text tower that starts from
            scratch learns from them what a negation is.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> import nibabel, numpy as np
    >>> from modeling_t3d.data.datasets import PretrainingDataset
    >>> from modeling_t3d.data.manifest import read_manifest
    >>> from modeling_t3d.image_processing_t3d import T3DImageProcessor

    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> scan = np.full((40, 40, 20), -1000, dtype=np.int16)
    >>> scan[8:32, 8:32] = 40
    >>> nibabel.save(nibabel.Nifti1Image(scan, np.diag([3.0, 3.0, 3.0, 1.0])), folder / "a.nii.gz")
    >>> _ = (folder / "manifest.csv").write_text("volume,report\\na.nii.gz,The heart is of normal size.\\n")
    >>> processor = T3DImageProcessor(spacing=(3, 3, 3), global_size=(16, 16, 16), local_size=(8, 8, 8))
    >>> dataset = PretrainingDataset(read_manifest(folder / "manifest.csv").rows, processor, folder / "prepared")
    >>> dataset[0].prepared.array.shape
    (20, 40, 40)

    ```"""

    def __init__(
        self,
        rows: Sequence[ManifestRow],
        image_processor: Any,
        cache_dir: str | Path | None = None,
        *,
        store: VolumeStore | str | Path | None = None,
        keep_global_views: bool = False,
        seed: int = 0,
        num_sentence_texts: int = 0,
    ) -> None:
        if num_sentence_texts < 0:
            raise ValueError(f"num_sentence_texts must be 0 or more, got {num_sentence_texts}")
        missing = [row.number for row in rows if not row.report]
        if missing:
            raise ValueError(
                f"row {missing[0]} of the manifest has no report; pre-training needs one for every volume: write it, "
                "or generate captions with examples/generate_captions.py"
            )
        self.rows = list(rows)
        self.image_processor = image_processor
        self.store = _open_store(image_processor, cache_dir, store)
        if keep_global_views and self.store is None:
            raise ValueError("keep_global_views keeps them in a store: give the data set a cache_dir or a store")
        self.keep_global_views = keep_global_views
        self.seed = seed
        self.num_sentence_texts = num_sentence_texts
        self._keys: dict[int, tuple[Any, str]] = {}
        self._global_views: dict[int, np.ndarray] = {}
        self._global_bytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Hash of what the rows pair and how views are cut: a run must not resume on other data."""
        settings = self.image_processor.to_dict()
        cuts = {name: settings[name] for name in settings.keys() - set(LOADER_ARGUMENTS)}
        digest = hashlib.sha256(f"{self.num_sentence_texts}{preparation_text(cuts)}".encode())
        for row in self.rows:
            digest.update(f"{row.volume.name}\0{row.report}\0{row.full_report}\0{row.study_id}\0".encode())
        return digest.hexdigest()

    @property
    def row_numbers(self) -> list[int]:
        """Rows of the manifest, by which a message names samples: nothing in them identifies a person."""
        return [row.number for row in self.rows]

    def prepared(self, index: int) -> PreparedVolume:
        """The prepared volume of a row."""
        row = self.rows[index]
        try:
            if self.store is None:
                return self._prepare(row)
            key = self._key(index)
            # A store of the manifest's own may be all that there is, and far: its tiles are checked as they are read.
            is_stored = key == row.key
            prepared = self.store.open(key) if is_stored else self.store.load(key, lambda: self._prepare(row))
        except FileNotFoundError:
            raise FileNotFoundError(f"{row.volume}: the volume of row {row.number} has vanished") from None
        # The same content may have been prepared under another name.
        prepared.source = str(row.volume)
        return prepared

    def _key(self, index: int) -> str:
        """Key of a row's volume; one that the manifest names counts where the store has it."""
        row, store = self.rows[index], cast(VolumeStore, self.store)
        stamp, key = self._keys.get(index, (None, ""))
        if key and key == row.key:
            return key
        if row.key is not None and row.key in store:
            self._keys[index] = None, row.key
            return row.key
        # Looked up anew when the source changes; one that has vanished raises here.
        try:
            status = row.volume.stat()
        except FileNotFoundError:
            if row.key is None:
                raise
            raise StoreError(
                f"{store.url}: no volume {row.key}, which row {row.number} of the manifest names, and no source file "
                "to prepare it from; give the store that was built with this manifest, or build it anew with "
                "examples/prepare_dataset.py"
            ) from None
        if stamp != (status.st_size, status.st_mtime_ns):
            key = rescaled_key(store.key_of(row.volume), row.rescale)
            self._keys[index] = (status.st_size, status.st_mtime_ns), key
        return key

    def _prepare(self, row: ManifestRow) -> PreparedVolume:
        return self.image_processor.prepare(open_source(row.volume, row.rescale))

    def _global_values(self, index: int, prepared: PreparedVolume) -> torch.Tensor | None:
        """The kept global view of a row, before windows."""
        if self.store is None or not self.keep_global_views:
            return None
        if index in self._global_views:
            return torch.from_numpy(self._global_views[index].astype(np.float32))
        processor = self.image_processor

        def make() -> PreparedVolume:
            values = processor.global_values(prepared).numpy()
            if prepared.array.dtype == np.int16:
                values = np.rint(values).astype(np.int16)
            affine = processor.geometry(prepared).global_affine
            return PreparedVolume(values, affine, whole_volume_mask(values.shape))

        values = self.store.keep(self._key(index), processor.global_key(), make).array
        if self._global_bytes + values.nbytes <= _KEPT_IN_MEMORY:
            self._global_views[index] = values
            self._global_bytes += values.nbytes
        return torch.from_numpy(values.astype(np.float32))

    def __getitem__(self, key: int | tuple[int, int, int]) -> PretrainingSample:
        """A sample by index, or by (epoch, position of the batch in the epoch, index) as the trainer asks for it."""
        epoch, batch, index = (0, 0, key) if isinstance(key, int) else key
        row = self.rows[index]
        # Keyed by the text and not by the row: identical reports stay identical.
        report = row.full_report or row.report
        seeds = ((self.seed, _SENTENCES, epoch, stable_id(report), draw) for draw in range(self.num_sentence_texts))
        prepared = self.prepared(index)
        return PretrainingSample(
            prepared=prepared,
            text=row.report,
            sentences=tuple(sample_sentences(report, seed) for seed in seeds),
            study_id=stable_id(row.study_id),
            report_id=stable_id(row.report),
            view_seed=(self.seed, _VIEWS, epoch, index),
            batch_seed=(self.seed, _ALIGNED, epoch, batch),
            global_values=self._global_values(index, prepared),
        )

    def blank_samples(self, count: int) -> list[PretrainingSample]:
        """Samples of air with the longest report: what a batch takes is seen without preparing any volume."""
        shape = self.image_processor.local_size
        blank = copy.copy(self)
        blank.store = None
        array, scale = np.full(shape, -1000, dtype=np.int16), None
        if self.image_processor.intensity != "hu":
            array, scale = np.zeros(shape, dtype=np.float32), (0.0, 1.0)
        air = PreparedVolume(array, np.eye(4), whole_volume_mask(shape), scale)
        blank._prepare = lambda row: air  # type: ignore[method-assign]
        longest = max(range(len(self)), key=lambda index: len(self.rows[index].report or ""))
        return [blank[longest]] * count

    def prepare(self, index: int) -> PreparedVolume:
        """What an access to the row would otherwise make and keep."""
        prepared = self.prepared(index)
        self._global_values(index, prepared)
        return prepared

    def prepare_all(self, num_workers: int = 1, *, rank: int = 0, num_processes: int = 1) -> Counter[str]:
        """
        Fill the store before training; a volume that cannot be read raises here and not hours later.

        Args:
            num_workers (`int`, defaults to 1): processes; 0 uses this one.
            rank, num_processes (`int`): prepare only this process's share of the rows.

        Returns:
            How many volumes came with each warning (`Counter`); they are printed too.
        """
        if self.store is None:
            raise ValueError("prepare_all fills a store: give the data set a cache_dir or a store")
        indices = range(rank, len(self), num_processes)
        loader = DataLoader(
            _Preparation(self, indices),
            batch_size=None,
            num_workers=num_workers,
            # A loader seeds its workers from the global generator unless it is given one.
            generator=torch.Generator(),
        )
        warnings: Counter[str] = Counter()
        for outcome in tqdm(loader, desc="preparing volumes", unit="volume", disable=None if rank == 0 else True):
            if isinstance(outcome, Exception):
                raise outcome
            warnings.update(outcome)
        for warning, count in warnings.most_common():
            logger.warning("%d volumes: %s", count, warning)
        return warnings


def _open_store(
    image_processor: Any, cache_dir: str | Path | None, store: VolumeStore | str | Path | None
) -> VolumeStore | None:
    """The store of prepared volumes; below a cache folder there is one for each preparation."""
    if store is not None and cache_dir is not None:
        raise ValueError("cache_dir and store are two places for the same volumes; give one of them")
    if cache_dir is not None:
        preparation = preparation_text(image_processor.preparation_key())
        folder = hashlib.sha256(preparation.encode()).hexdigest()[:12]
        return VolumeStore.create(Path(cache_dir) / folder, image_processor)
    if store is None:
        return None
    store = store if isinstance(store, VolumeStore) else VolumeStore(store)
    store.require(image_processor)
    return store


class _Preparation(Dataset):
    """Prepares volumes in loader processes; errors travel as values, because a loader wraps those that are raised."""

    def __init__(self, dataset: PretrainingDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> list[str] | Exception:
        try:
            return list(self.dataset.prepare(self.indices[position]).warnings)
        except (VolumeError, OSError) as error:
            return error


class PretrainingCollator:
    """
    Samples to a batch of [`T3DForPreTraining`]: views are cut, reports tokenised and padded to the longest.

    Args:
        processor (`T3DProcessor`):
            Image processor and tokenizer. Reports of more than its `max_report_tokens` are cut; see `count_truncated`.
        num_local_views (`int`, *optional*): per volume; the image processor's by default, 0 for none.
        global_views (`bool`, defaults to `True`): cut them; no term of some objectives reads them.
        corruption_seeds (`bool`, defaults to `False`): add each sample's own, for restoration.
    """

    def __init__(
        self,
        processor: Any,
        *,
        num_local_views: int | None = None,
        global_views: bool = True,
        corruption_seeds: bool = False,
    ) -> None:
        self.image_processor = processor.image_processor
        self.tokenizer = processor.tokenizer
        self.num_local_views = self.image_processor.num_local_views if num_local_views is None else num_local_views
        self.global_views = global_views
        self.corruption_seeds = corruption_seeds
        self.max_report_tokens = min(processor.max_report_tokens, self.tokenizer.model_max_length)
        self._tokenize = TokenCache(self.tokenizer, self.max_report_tokens)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes other batches of the same samples, as JSON holds it; what changes them names itself in it."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return {
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "max_report_tokens": self.max_report_tokens,
            "num_local_views": self.num_local_views,
            "augmentation": None,
            "crop_perturbation": None,
            "texts": None,
        }

    def __call__(self, samples: Sequence[PretrainingSample]) -> dict[str, torch.Tensor]:
        """One batch; view places come from the samples' seeds, never from a global generator."""
        batch = self._tokenize([sample.text for sample in samples])
        num_sentences = len(samples[0].sentences)
        if num_sentences:
            sentences = [sentence for sample in samples for sentence in sample.sentences]
            for name, values in self._tokenize(sentences).items():
                batch[f"sentence_{name}"] = values.unflatten(0, (-1, num_sentences))
            ids = torch.tensor([stable_id(sentence) for sentence in sentences])
            batch["sentence_ids"] = ids.unflatten(0, (-1, num_sentences))
        if self.global_views:
            batch["pixel_values"] = torch.stack(
                [self.image_processor.global_view(sample.prepared, sample.global_values) for sample in samples]
            )
        if self.num_local_views:
            batch.update(self._local_views(samples))
        batch["study_ids"] = torch.tensor([sample.study_id for sample in samples])
        batch["report_ids"] = torch.tensor([sample.report_id for sample in samples])
        if self.corruption_seeds:
            sequences = (np.random.SeedSequence((_CORRUPTION, *sample.view_seed)) for sample in samples)
            words = [int(sequence.generate_state(1, np.uint64)[0]) >> 1 for sequence in sequences]
            batch["corruption_seeds"] = torch.tensor(words)
        return batch

    def _local_views(self, samples: Sequence[PretrainingSample]) -> dict[str, torch.Tensor]:
        shared = None
        if self.image_processor.view_sampling == "aligned":
            shared = aligned_positions(self.num_local_views, np.random.default_rng(samples[0].batch_seed))
        return self.image_processor.stack_views(
            [
                self.image_processor.make_views(
                    sample.prepared, self.num_local_views, np.random.default_rng(sample.view_seed), shared
                )
                for sample in samples
            ]
        )

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many reports have more tokens than the model is given."""
        lengths = (len(ids) for ids in self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"])
        return sum(length > self.max_report_tokens for length in lengths)


__all__ = ["PretrainingCollator", "PretrainingDataset", "PretrainingSample", "sample_sentences", "stable_id"]
