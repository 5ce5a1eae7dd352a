# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Results of an evaluation: one object that prints as a table and writes `results.json`, never without its card."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from .figures import plot_attention
from .findings import FindingsTable
from .leak import LeakReport
from .localisation import LocalisationSummary
from .probes import StudyIdentity
from .protocol import ProtocolCard
from .retrieval import RetrievalMetrics, VolumeRetrievalMetrics
from .segmentation_probe import SegmentationProbe
from .statistics import Interval

RESULTS_NAME = "results.json"
RESULTS_FORMAT = 1


@dataclass
class Results:
    """Everything one evaluation measured.

    Attributes:
        protocol: how it was measured.
        zero_shot: the per-finding table of the model.
        comparisons: name -> table on the same units ("shortcut baseline", "linear probe", "supervised ceiling").
        retrieval: "report_to_volume" and "volume_to_report".
        volume_retrieval: among volumes.
        leak: leak control of the multi-view alignment.
        study_identity: probe for study identity.
        localisation: attention against lesion masks; "all" lesions and each finding.
        segmentation: linear probe of the feature maps for organs.
        extra: anything else that is plain JSON (losses, durations, settings).

    Example:

    ```python
    >>> from modeling_t3d.evaluation.zero_shot import evaluate_zero_shot

    >>> results = evaluate_zero_shot(model, processor, samples, prompts)  # doctest: +SKIP
    >>> print(results.to_markdown())  # doctest: +SKIP
    >>> results.save("my-model")  # doctest: +SKIP

    ```
    """

    protocol: ProtocolCard
    zero_shot: FindingsTable | None = None
    comparisons: dict[str, FindingsTable] = field(default_factory=dict)
    retrieval: dict[str, RetrievalMetrics] = field(default_factory=dict)
    volume_retrieval: VolumeRetrievalMetrics | None = None
    leak: LeakReport | None = None
    study_identity: StudyIdentity | None = None
    localisation: dict[str, LocalisationSummary] = field(default_factory=dict)
    segmentation: SegmentationProbe | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; undefined numbers are None."""
        return {"format": RESULTS_FORMAT, **{name: _plain(value) for name, value in vars(self).items()}}

    def save(self, path: str | os.PathLike) -> Path:
        """Write `results.json` into a folder, or to a path that ends in .json; a file is replaced in one step."""
        path = Path(path)
        path = path if path.suffix == ".json" else path / RESULTS_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self.to_dict(), file, indent=2, allow_nan=False)
                file.write("\n")
            # mkstemp makes private files; results are as readable as any other file of the folder.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    def metrics(self) -> dict[str, float]:
        """The few numbers for a tracker: mean AUROC of each group, recalls of report-to-volume retrieval, the leak."""
        values: dict[str, float] = {}
        if self.zero_shot is not None:
            for group, result in self.zero_shot.groups.items():
                values[f"auroc_{group}"] = result.auroc.value
        for direction, metrics in self.retrieval.items():
            for k, recall in metrics.recall.items():
                values[f"{direction}_recall_at_{k}"] = recall.value
        if self.leak is not None and self.leak.leak is not None:
            values["tma_leak"] = self.leak.leak
        if "all" in self.localisation:
            values["pointing"] = self.localisation["all"].pointing.value
            values["localisation_auprc"] = self.localisation["all"].average_precision.value
        if self.segmentation is not None:
            values["segmentation_dice"] = self.segmentation.mean.value
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def to_markdown(self) -> str:
        """The tables, then one line per further measurement, then how it was measured."""
        parts = []
        if self.zero_shot is not None:
            parts.append(_findings_markdown(self.zero_shot, self.comparisons))
        if self.retrieval:
            parts.append(_retrieval_markdown(self.retrieval))
        if self.localisation:
            parts.append(_localisation_markdown(self.localisation))
        parts.append("\n".join(f"- {line}" for line in (*self._measurements(), *_card_lines(self.protocol))))
        return "\n\n".join(parts) + "\n"

    def _measurements(self) -> list[str]:
        """Lines for what needs no table."""
        lines = []
        if self.volume_retrieval is not None:
            values = ", ".join(
                f"MAP@{k} {_with_interval(value)}" for k, value in self.volume_retrieval.mean_average_precision.items()
            )
            lines.append(f"Volume to volume: {values} (share of right candidates {self.volume_retrieval.chance:.3f}).")
        if self.leak is not None:
            lines.append(f"Leak control: {self.leak.describe()}.")
        if self.study_identity is not None:
            identity = self.study_identity
            lines.append(
                f"Study identity: nearest view of the same study in {identity.nearest_neighbour_accuracy:.3f} of "
                f"{identity.num_views} views (chance {identity.chance:.3f}), same against other study AUROC "
                f"{identity.area_under_roc:.3f}."
            )
        if self.segmentation is not None:
            probe = self.segmentation
            lines.append(
                f"Segmentation probe: mean Dice {_with_interval(probe.mean)} over {len(probe.dice)} organs, "
                f"{probe.num_volumes} volumes (fitted on {probe.num_fitted_volumes} of other patients)."
            )
        return lines


def load_results(path: str | os.PathLike) -> dict[str, Any]:
    """The dictionary that [`Results.save`] wrote, from a folder or a .json path."""
    path = Path(path)
    file = path if path.suffix == ".json" else path / RESULTS_NAME
    loaded = json.loads(file.read_text(encoding="utf-8"))
    if loaded.get("format") != RESULTS_FORMAT:
        raise ValueError(f"{path} holds results of format {loaded.get('format')}, this version reads {RESULTS_FORMAT}")
    return loaded


def _plain(value: Any) -> Any:
    """Dataclasses, arrays' scalars and tuples as JSON types; nan and infinities as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: float, digits: int = 3) -> str:
    return "undefined" if math.isnan(value) else f"{value:.{digits}f}"


def _with_interval(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "undefined"
    if math.isnan(interval.low):
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} ({interval.low:.3f}–{interval.high:.3f})"


def _auroc(table: FindingsTable, name: str) -> float:
    """AUROC of a finding or group of a comparison, nan where it was not compared."""
    try:
        return table.auroc(name)
    except KeyError:
        return float("nan")


def _findings_markdown(table: FindingsTable, comparisons: Mapping[str, FindingsTable]) -> str:
    """Per finding, then the means of the groups; comparisons as further AUROC columns."""
    with_thresholds = any(row.at_threshold is not None for row in table.findings)
    header = ["finding", "n", "positive", "prevalence", "AUROC (interval)", "AP"]
    header += ["F1", "weighted F1", "accuracy"] if with_thresholds else []
    lines = [[*header, *(f"AUROC, {name}" for name in comparisons)]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for row in table.findings:
        cells = [row.finding, str(row.num_units), str(row.num_positive), f"{100 * row.prevalence:.1f} %"]
        cells += [_with_interval(row.auroc), _number(row.average_precision)]
        if with_thresholds:
            at = row.at_threshold
            cells += [""] * 3 if at is None else [_number(at.f1), _number(at.weighted_f1), _number(at.accuracy)]
        lines.append([*cells, *(_number(_auroc(other, row.finding)) for other in comparisons.values())])
    for name, group in table.groups.items():
        counted = f"{group.num_defined} findings"
        if group.num_undefined:
            counted += f", {group.num_undefined} undefined left out"
        cells = [f"**mean, {name}** ({counted})", "", "", "", f"**{_with_interval(group.auroc)}**", ""]
        if with_thresholds:
            means = (group.f1, group.weighted_f1, group.accuracy)
            cells += ["" if value is None else _number(value) for value in means]
        lines.append([*cells, *(_number(_auroc(other, name)) for other in comparisons.values())])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _retrieval_markdown(retrieval: Mapping[str, RetrievalMetrics]) -> str:
    """One row per direction and K."""
    lines = ["| retrieval | recall (interval) | chance |", "| --- | ---: | ---: |"]
    for direction, metrics in retrieval.items():
        name = direction.replace("_", " ")
        for k, recall in metrics.recall.items():
            lines.append(f"| {name}, R@{k} | {_with_interval(recall)} | {metrics.chance[k]:.3f} |")
        ranks = f"{metrics.median_rank:g} / {metrics.mean_rank:.1f}"
        lines.append(f"| {name}, median / mean rank | {ranks} of {metrics.num_candidates} | |")
    return "\n".join(lines)


def _localisation_markdown(localisation: Mapping[str, LocalisationSummary]) -> str:
    """One row per finding, chance levels beside the measurements."""
    header = [
        "localisation",
        "lesions",
        "outside views",
        "pointing",
        "AUPRC",
        "chance",
        "pointing within view",
        "chance",
    ]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, found in localisation.items():
        measured = [_with_interval(found.pointing), _with_interval(found.average_precision), _number(found.chance)]
        within = [_with_interval(found.pointing_within_view), _number(found.chance_within_view)]
        lines.append([name, str(found.num_scored), str(found.num_left_out), *measured, *within])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _card_lines(card: ProtocolCard) -> list[str]:
    """The protocol card in words; the full card is in the JSON file."""
    num_prompts = sum(len(pairs) for pairs in card.prompts.values())
    lines = [
        f'Protocol "{card.protocol}"'
        + (" (optimistic: tuned on the evaluation set itself)" if card.optimistic else ""),
        f"Unit: {card.unit}; {card.num_units} units, {card.num_volumes} volumes, {card.num_studies} studies, "
        f"{card.num_patients} patients; split {card.split_hash[:12]}.",
        f"Score: {card.score}; {num_prompts} prompt pairs for {len(card.prompts)} findings.",
        f"De-duplication: {card.de_duplication}. Thresholds: {card.threshold_source}.",
        f"Intervals: {100 * float(card.bootstrap['confidence']):g} %, {card.bootstrap['num_resamples']} resamples of "
        f"{card.bootstrap['level']}s, seed {card.bootstrap['seed']}.",
        f"Code: {card.commit or 'no commit known'}; "
        + ", ".join(f"{name} {version}" for name, version in card.versions.items())
        + ".",
    ]
    return lines + list(card.notes)


__all__ = ["Results", "load_results", "plot_attention"]
