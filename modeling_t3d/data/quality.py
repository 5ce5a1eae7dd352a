# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Looks a data set over before anything is trained on it: counts, missing and unreadable files, reports, leakage
between splits, unusual spacings and HU. It changes nothing; `quality_page` shows what it finds.

Volumes and people are named by their row of the manifest alone: paths and ids often identify a patient.
"""

import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from .manifest import ManifestError, ManifestRow, nameless_leaks, parse_row
from .manifest_files import read_records
from .quality_volume import VolumeFacts, examine_volume

MIN_REPORT_WORDS = 5  # as `read_manifest` has it
OUTLIER_DEVIATIONS = 5.0  # robust standard deviations from the median [choice]
MIN_VOLUMES_FOR_OUTLIERS = 8  # fewer have no usual value [choice]
# Smallest deviation that counts as one, by measure: data sets of one scanner vary by less than rounding.
_FLOORS = {
    "slice spacing": 0.1,  # mm
    "pixel spacing": 0.05,  # mm
    "length": 20.0,  # mm
    "tissue": 10.0,  # HU
    "lowest": 15.0,  # HU
    "highest": 100.0,  # HU
}
UNITS = {name: "mm" if floor < 10 or name == "length" else "HU" for name, floor in _FLOORS.items()}


class Check(NamedTuple):
    """One thing that was looked at: `level` is `"good"`, `"warning"` or `"error"`, `rows` those concerned."""

    name: str
    level: Literal["good", "warning", "error"]
    text: str
    rows: tuple[int, ...] = ()


class Outlier(NamedTuple):
    """A volume whose measure lies far from the others': row, measure, its value and the usual one."""

    number: int
    measure: str
    value: float
    usual: float


class SplitCounts(NamedTuple):
    """What one split holds."""

    volumes: int
    studies: int
    patients: int
    with_report: int
    with_labels: int


@dataclass
class QualityReport:
    """
    What was found in a manifest and its volumes.

    Args:
        name (`str`): of the manifest's file.
        num_rows, num_volumes, num_studies, num_patients (`int`): of the manifest; volumes are its usable rows.
        checks (`list[Check]`): in the order of their weight.
        splits (`dict[str, SplitCounts]`): by split.
        volumes_per_study (`Counter[int]`): how many studies have so many volumes.
        reconstructions (`Counter[str]`): volumes by reconstruction, where several patients have it; `"other"` else.
        labels (`dict[str, tuple[int, int, int]]`): finding -> present, absent, unknown.
        report_words (`list[int]`): words of each report.
        volumes (`list[VolumeFacts]`): those that were opened and read.
        outliers (`list[Outlier]`): farthest first.
    """

    name: str
    num_rows: int
    num_volumes: int = 0
    num_studies: int = 0
    num_patients: int = 0
    checks: list[Check] = field(default_factory=list)
    splits: dict[str, SplitCounts] = field(default_factory=dict)
    volumes_per_study: Counter[int] = field(default_factory=Counter)
    reconstructions: Counter[str] = field(default_factory=Counter)
    labels: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    report_words: list[int] = field(default_factory=list)
    volumes: list[VolumeFacts] = field(default_factory=list)
    outliers: list[Outlier] = field(default_factory=list)

    @property
    def is_usable(self) -> bool:
        """Whether no check found an error."""
        return all(check.level != "error" for check in self.checks)


def examine_manifest(
    manifest: str | Path, *, max_volumes: int = 500, num_workers: int = 1, seed: int = 0
) -> QualityReport:
    """
    Look over a manifest, and over its volumes or a random sample of them.

    Args:
        manifest (`str` or `Path`): a `.csv`, `.jsonl` or `.parquet` file.
        max_volumes (`int`, defaults to 500): how many volumes are opened; all others are only looked for.
        num_workers (`int`, defaults to 1): processes that open them; 0 and 1 are this one.
        seed (`int`, defaults to 0): of the sample.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> from modeling_t3d.data.quality import examine_manifest

    >>> path = pathlib.Path(tempfile.mkdtemp()) / "manifest.csv"
    >>> _ = path.write_text("volume,report\\ngone.nii.gz,The heart is of normal size.\\n")
    >>> [check.text for check in examine_manifest(path).checks if check.level == "error"]
    ['1 volume file missing']

    ```"""
    manifest = Path(manifest)
    records, _ = read_records(manifest)
    report = QualityReport(manifest.name, len(records))
    rows, wrong = [], []
    for number, record in records:
        try:
            rows.append(parse_row(manifest, number, record))
        except ManifestError:
            wrong.append(number)
    report.checks.append(
        _check("rows", wrong, "row{s} that cannot be used: no volume, or a cell that is no label or no JSON")
    )
    _count(report, rows)
    present = [row for row in rows if row.volume.exists()]
    # A volume with a key is in a store; its source may be anywhere.
    missing = [row.number for row in rows if row.key is None and not row.volume.exists()]
    report.checks.append(_check("missing files", missing, "volume file{s} missing"))
    masks = [row.number for row in rows if not all(mask.exists() for mask in row.masks.values())]
    report.checks.append(_check("missing masks", masks, "row{s} with a missing mask"))
    _check_identities(report, rows, manifest.parent)
    _check_reports(report, rows)
    _open_volumes(report, present, max_volumes, num_workers, seed)
    return report


def _check(
    name: str, numbers: Iterable[int], text: str, level: Literal["warning", "error"] = "error", good: str = ""
) -> Check:
    found = tuple(sorted(set(numbers)))
    if not found:
        return Check(name, "good", good or "none")
    return Check(name, level, f"{len(found)} {text}".replace("{s}", "" if len(found) == 1 else "s"), found)


def _count(report: QualityReport, rows: Sequence[ManifestRow]) -> None:
    by_split: dict[str, list[ManifestRow]] = defaultdict(list)
    for row in rows:
        by_split[row.split].append(row)
    for name, members in sorted(by_split.items(), key=lambda item: -len(item[1])):
        report.splits[name] = SplitCounts(
            len(members),
            len({row.study_id for row in members}),
            len({row.patient_id for row in members}),
            sum(bool(row.report) for row in members),
            sum(bool(row.labels) for row in members),
        )
    report.num_volumes = len(rows)
    report.num_studies = len({row.study_id for row in rows})
    report.num_patients = len({row.patient_id for row in rows})
    report.volumes_per_study = Counter(Counter(row.study_id for row in rows).values())
    patients = defaultdict(set)
    for row in rows:
        if row.reconstruction:
            patients[row.reconstruction].add(row.patient_id)
    # A name that only one patient has may be that patient's.
    shared = {name for name, people in patients.items() if len(people) > 1}
    names = (row.reconstruction if row.reconstruction in shared else "other" for row in rows if row.reconstruction)
    report.reconstructions = Counter(name for name in names if name)
    labels: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        for name, value in row.labels.items():
            if value is not None:
                labels[name][0 if value else 1] += 1
    report.labels = {
        name: (present, absent, len(rows) - present - absent) for name, (present, absent) in sorted(labels.items())
    }


def _check_identities(report: QualityReport, rows: Sequence[ManifestRow], folder: Path) -> None:
    leaks = [row.number for group in _groups(rows, lambda row: row.patient_id) if _spans(group) for row in group]
    text = "row{s} of patients who are in more than one split: every score on the later split would be too good"
    report.checks.append(_check("patients in two splits", leaks, text))
    leaks = [row.number for group in _groups(rows, lambda row: row.study_id) if _spans(group) for row in group]
    leaks = sorted({*leaks, *(row.number for pair in nameless_leaks(rows) for row in pair)})
    report.checks.append(_check("studies in two splits", leaks, "row{s} of studies in more than one split"))
    twice = [row.number for group in _groups(rows, lambda row: row.volume.resolve()) for row in group[1:]]
    report.checks.append(_check("repeated volumes", twice, "row{s} naming a volume that an earlier row names"))
    unknown = [row.number for row in rows if folder / row.patient_id == row.volume]
    text = "row{s} without patient and study: leakage between splits cannot be seen"
    report.checks.append(_check("unnamed patients", unknown, text, "warning"))


def _check_reports(report: QualityReport, rows: Sequence[ManifestRow]) -> None:
    report.report_words = [len(row.report.split()) for row in rows if row.report]
    silent = [row.number for row in rows if not row.report]
    # A manifest without any text is one of labels.
    level: Literal["warning", "error"] = "error" if report.report_words else "warning"
    report.checks.append(_check("empty reports", silent, "row{s} without a report", level))
    short = [row.number for row in rows if 0 < len(row.report.split()) < MIN_REPORT_WORDS]
    text = f"report{{s}} of fewer than {MIN_REPORT_WORDS} words: not trained on"
    report.checks.append(_check("short reports", short, text, "warning"))
    repeated = [
        row.number
        for group in _groups((row for row in rows if row.report), lambda row: " ".join(row.report.casefold().split()))
        if len({row.study_id for row in group}) > 1
        for row in group
    ]
    text = "report{s} found word for word in other studies: such pairs are not negatives of each other"
    report.checks.append(_check("duplicate reports", repeated, text, "warning"))


def _groups(rows: Iterable[ManifestRow], key: Callable[[ManifestRow], Hashable]) -> list[list[ManifestRow]]:
    """Rows that share a key, two or more."""
    found: dict[Hashable, list[ManifestRow]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return [group for group in found.values() if len(group) > 1]


def _spans(group: Sequence[ManifestRow]) -> bool:
    return len({row.split for row in group}) > 1


def _open_volumes(
    report: QualityReport, rows: Sequence[ManifestRow], max_volumes: int, num_workers: int, seed: int
) -> None:
    chosen = list(rows)
    if len(rows) > max_volumes:
        places = np.random.default_rng(seed).choice(len(rows), max_volumes, replace=False)
        chosen = [rows[place] for place in sorted(places)]
    tasks = [(row.number, row.volume, row.rescale) for row in chosen]
    with tqdm(total=len(tasks), desc="opening volumes", unit="volume", disable=None) as bar:
        if num_workers > 1 and len(tasks) > 1:  # a process costs as long to begin as some volumes take
            with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = [_told(bar, facts) for facts in pool.map(examine_volume, *zip(*tasks, strict=True))]
        else:
            found = [_told(bar, examine_volume(*task)) for task in tasks]
    sample = f" (of {len(chosen)} that were opened, {len(rows)} are there)" if len(chosen) < len(rows) else ""
    reasons = Counter(facts.error for facts in found if facts.error)
    examples = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    unreadable = [facts.number for facts in found if facts.error]
    text = f"volume{{s}} that cannot be read{sample}: {examples}"
    report.checks.append(_check("unreadable volumes", unreadable, text, good=f"none{sample}"))
    report.volumes = [facts for facts in found if not facts.error]
    not_hounsfield = [facts.number for facts in report.volumes if facts.not_hounsfield]
    reasons = Counter(facts.not_hounsfield for facts in report.volumes if facts.not_hounsfield)
    examples = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(2))
    report.checks.append(
        _check("values that are no HU", not_hounsfield, f"volume{{s}} whose values are no HU: {examples}")
    )
    report.outliers = find_outliers(report.volumes)
    text = "volume{s} of unusual spacing, length or HU"
    report.checks.append(_check("outliers", (outlier.number for outlier in report.outliers), text, "warning"))


def _told(bar: tqdm, facts: VolumeFacts) -> VolumeFacts:
    bar.update()
    return facts


def find_outliers(volumes: Sequence[VolumeFacts]) -> list[Outlier]:
    """Volumes more than `OUTLIER_DEVIATIONS` robust standard deviations from the median, farthest first."""
    found = []
    for measure, floor in _FLOORS.items():
        # Label maps among the volumes would make the usual HU theirs.
        comparable = [facts for facts in volumes if UNITS[measure] == "mm" or not facts.not_hounsfield]
        if len(comparable) < MIN_VOLUMES_FOR_OUTLIERS:
            continue
        values = np.array([facts.measures[measure] for facts in comparable])
        usual = float(np.median(values))
        # 1.4826 makes the median absolute deviation a standard deviation where values are normal.
        spread = max(1.4826 * float(np.median(np.abs(values - usual))), floor)
        for facts, value in zip(comparable, values, strict=True):
            distance = abs(float(value) - usual) / spread
            if distance > OUTLIER_DEVIATIONS:
                found.append((distance, Outlier(facts.number, measure, float(value), usual)))
    return [outlier for _, outlier in sorted(found, key=lambda pair: -pair[0])]


__all__ = ["Check", "Outlier", "QualityReport", "SplitCounts", "examine_manifest", "find_outliers"]
