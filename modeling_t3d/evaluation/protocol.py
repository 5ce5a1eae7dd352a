# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The protocol card: everything a reader needs to know how a number came about, written beside every result."""

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("modeling-t3d", "torch", "transformers", "numpy", "tokenizers", "safetensors", "monai")


@dataclass(frozen=True)
class ProtocolCard:
    """How a result was measured.

    Attributes:
        protocol: "clean" or the name of a published protocol that is followed to the letter.
        unit: "study" (scores averaged over a study's reconstructions) or "reconstruction".
        num_units, num_volumes, num_studies, num_patients: counts of the evaluation set.
        split_hash: SHA-256 over the sorted (patient, study, reconstruction) ids of the evaluation set.
        prompts: finding -> (positive, negative) prompt pairs.
        score: formula of the score, with the aggregation over prompts.
        temperature: tau in that formula.
        de_duplication: what counts as the same study or report.
        thresholds: finding -> threshold, where any was used.
        threshold_source: where they come from.
        optimistic: whether anything was chosen on the evaluation set itself.
        bootstrap: level, num_resamples, confidence, seed.
        seed: of everything else that is random.
        versions: package -> version.
        commit: of the code, with "+changes" when the working tree differs; None outside a repository.
        notes: free lines.
    """

    protocol: str
    unit: str
    num_units: int
    num_volumes: int
    num_studies: int
    num_patients: int
    split_hash: str
    prompts: Mapping[str, Sequence[tuple[str, str]]]
    score: str
    temperature: float | None
    de_duplication: str
    thresholds: Mapping[str, float]
    threshold_source: str
    optimistic: bool
    bootstrap: Mapping[str, int | float | str]
    seed: int
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    commit: str | None = field(default_factory=lambda: source_commit())
    notes: tuple[str, ...] = ()


def split_hash(
    patient_ids: Sequence[Hashable], study_ids: Sequence[Hashable], reconstructions: Sequence[Hashable] | None = None
) -> str:
    """SHA-256 of a set of volumes, independent of their order; ids enter the hash only, never the file.

    Example:

    ```python
    >>> from modeling_t3d.evaluation.protocol import split_hash
    >>> split_hash(["p", "q"], ["s", "t"]) == split_hash(["q", "p"], ["t", "s"])
    True

    ```
    """
    reconstructions = reconstructions if reconstructions is not None else [""] * len(study_ids)
    rows = zip(patient_ids, study_ids, reconstructions, strict=True)
    # Length-prefixed fields: no id can imitate a separator.
    lines = sorted("".join(f"{len(str(value))}:{value}" for value in row) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def processor_name() -> str:
    """The CPU, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git(*arguments: str) -> str | None:
    """Output of a git command in this file's folder, None where git or a repository is missing."""
    try:
        finished = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None


def source_commit() -> str | None:
    """Commit of the package's own source, "+changes" appended when tracked files differ from it.

    An installed copy inside some other repository is not tracked there and has no commit.
    """
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git("rev-parse", "HEAD")
    # The package's folder, not the whole repository: results in a tracked folder do not change the code.
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", str(Path(__file__).parents[1]))
    return f"{commit}+changes" if changes else commit


__all__ = ["ProtocolCard", "package_versions", "processor_name", "source_commit", "split_hash"]
