# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The table of the ablation from its result files, and from nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ablation_arms import DEFAULT, FINDING_NAMES, GROUPS, Arm

from modeling_t3d.evaluation.statistics import (
    Interval,
    area_under_roc_per_finding,
    bootstrap_replicates,
    macro_mean,
    mean_over_findings,
    percentile_interval,
)

MISSING = "not measured"
ABSENT = "–"  # has no such measurement
NUM_RESAMPLES = 1000
HEADER = (
    "arm",
    "macro, validation",
    "against the default, validation",
    "macro",
    "diffuse",
    "focal",
    "report to volume R@5",
    "leak",
    "pointing",
    "AUPRC",
    "organ Dice",
    "study identity",
    "seeds",
    "steps",
    "minutes",
)
LEGEND = """AUROC is zero-shot with prompts that no training report holds: mean over seeds [range over seeds; 95 %
interval of that mean from {resamples} resamples of test patients]. Other cells: mean over seeds [range],
and the chance level where there is one. Validation phantoms choose, all other columns are test phantoms.
Against the default: difference of the macro AUROC [95 % interval from {resamples} resamples of patients, the same
for both arms, and of seeds]; a default follows an arm whose interval lies above zero.
R@5: recall of the right volume for a report. Leak: see `modeling_t3d/evaluation/leak.py`; undefined
while the loss is within 0.05 of chance. Pointing and AUPRC: the text's attention against focal lesions.
Organ Dice: a linear probe of the feature maps, on patients that it was not fitted on. Study
identity: share of local views whose nearest other view is of the same study. Minutes: of training, on
machines that may have had other work."""


def group_auroc(part: Mapping[str, Any], group: str) -> float:
    """Mean AUROC of a group of findings from stored scores."""
    values = area_under_roc_per_finding(np.array(part["labels"]), np.array(part["scores"]))
    return macro_mean(values[[FINDING_NAMES.index(name) for name in GROUPS[group]]]).mean


def _with_range(values: Sequence[float], *parts: str) -> str:
    """Mean over seeds, their range where there are several, further bracketed parts."""
    parts = (f"{min(values):.3f} to {max(values):.3f}",) * (len(values) > 1) + parts
    return f"{np.mean(values):.3f}" + (f" [{'; '.join(parts)}]" if parts else "")


def auroc_cell(results: Sequence[Mapping[str, Any]], split: str, group: str) -> str:
    """Mean over seeds, range, and on the test split the interval of the mean under resampled patients."""
    parts = [result[split] for result in results]
    values = [group_auroc(part, group) for part in parts]
    if np.isnan(values).any():
        return "undefined"
    if split != "test":
        return _with_range(values)
    interval = percentile_interval(float(np.mean(values)), np.mean(_replicates(results, split, group), axis=0))
    return _with_range(values, f"{interval.low:.3f} to {interval.high:.3f}")


def _replicates(results: Sequence[Mapping[str, Any]], split: str, group: str) -> np.ndarray:
    """
    AUROC of every result under resampled patients, of shape `(num_results, NUM_RESAMPLES)`.

    One seed of the bootstrap: each replicate draws the same patients for every trained model.
    """
    columns = [FINDING_NAMES.index(name) for name in GROUPS[group]]
    return np.stack(
        [
            mean_over_findings(
                bootstrap_replicates(
                    np.array(result[split]["labels"])[:, columns],
                    np.array(result[split]["scores"])[:, columns],
                    result[split]["patients"],
                    num_resamples=NUM_RESAMPLES,
                )
            )
            for result in results
        ]
    )


def difference(results: Sequence[Mapping[str, Any]], default: Sequence[Mapping[str, Any]]) -> Interval:
    """
    How far an arm's macro AUROC on the validation phantoms lies above the default's, with its 95 % interval.

    Patients are resampled for both arms together and seeds for each by itself: an arm that is better in the seeds that
    happened to be drawn, or on the few patients that happened to be there, is not better.
    """
    generator = np.random.default_rng(0)
    replicates = []
    for part in (results, default):
        seeds = generator.integers(len(part), size=(len(part), NUM_RESAMPLES))
        replicates.append(np.take_along_axis(_replicates(part, "validation", "macro"), seeds, axis=0).mean(axis=0))
    means = [np.mean([group_auroc(result["validation"], "macro") for result in part]) for part in (results, default)]
    return percentile_interval(float(means[0] - means[1]), replicates[0] - replicates[1])


def differences_of(
    arms: Sequence[Arm], results: Mapping[str, Mapping[int, Mapping[str, Any]]], seeds: Sequence[int]
) -> dict[str, Interval]:
    """[`difference`] of every other trained arm, by name, over the seeds that there are of it and of the default."""
    by_arm = {arm.name: _of_seeds(results.get(arm.name, {}), seeds) for arm in arms if arm.kind != "shortcut"}
    default = by_arm.pop(DEFAULT)
    return {name: difference(found, default) for name, found in by_arm.items() if found and default}


def _of_seeds(results: Mapping[int, Mapping[str, Any]], seeds: Sequence[int]) -> list[Mapping[str, Any]]:
    return [results[seed] for seed in seeds if seed in results]


def difference_cell(arm: Arm, found: Interval | None) -> str:
    """[`difference`] of a trained arm in a cell; the default has none from itself."""
    if arm.kind == "shortcut" or arm.name == DEFAULT:
        return ABSENT
    if found is None:
        return MISSING
    return "undefined" if np.isnan(found.value) else f"{found.value:+.3f} [{found.low:+.3f} to {found.high:+.3f}]"


def measurement_cell(results: Sequence[Mapping[str, Any]], *path: str, chance: Sequence[str] = ()) -> str:
    """Mean over seeds of one number of the stored measurements; `chance` is the place of its chance level."""

    def look_up(result: Mapping[str, Any], keys: Sequence[str]) -> Any:
        value: Any = result["measurements"]
        for key in keys:
            value = None if value is None else value.get(key)
        return value

    if any("measurements" not in result for result in results):
        return ABSENT
    if any(look_up(result, path[:1]) in (None, {}) for result in results):
        return ABSENT
    values = [look_up(result, path) for result in results]
    defined = [value for value in values if value is not None]
    if not defined:
        return "undefined"
    cell = _with_range(defined) + (f", {len(values) - len(defined)} undefined" if len(defined) < len(values) else "")
    levels = [look_up(result, chance) for result in results] if chance else []
    return cell + (f" (chance {np.mean(levels):.3f})" if levels and None not in levels else "")


def table_row(
    arm: Arm,
    results: Mapping[int, Mapping[str, Any]],
    seeds: Sequence[int],
    from_default: Interval | None,
) -> list[str]:
    """Cells of an arm from the results of its seeds, and from its [`difference`]."""
    found = _of_seeds(results, seeds)
    found = found[:1] if arm.kind == "shortcut" else found
    if not found:
        return [arm.label, *[MISSING] * (len(HEADER) - 1)]
    missing = [str(seed) for seed in seeds if seed not in results]
    measured = "none" if arm.kind == "shortcut" else ", ".join(str(seed) for seed in seeds if seed in results)
    if missing and arm.kind != "shortcut":
        measured += f"; {MISSING}: {', '.join(missing)}"
    recall, place = ("retrieval", "report_to_volume"), ("localisation", "all")
    return [
        arm.label,
        auroc_cell(found, "validation", "macro"),
        difference_cell(arm, from_default),
        *(auroc_cell(found, "test", group) for group in GROUPS),
        measurement_cell(found, *recall, "recall", "5", "value", chance=(*recall, "chance", "5")),
        measurement_cell(found, "leak", "leak"),
        measurement_cell(found, *place, "pointing", "value", chance=(*place, "chance")),
        measurement_cell(found, *place, "average_precision", "value", chance=(*place, "chance")),
        measurement_cell(found, "segmentation", "mean", "value"),
        measurement_cell(found, "study_identity", "nearest_neighbour_accuracy", chance=("study_identity", "chance")),
        measured,
        ABSENT if arm.kind == "shortcut" else ", ".join(str(result["steps"]) for result in found),
        ABSENT if arm.kind == "shortcut" else ", ".join(f"{result['minutes']:.1f}" for result in found),
    ]


def best_arm(arms: Sequence[Arm], results: Mapping[str, Mapping[int, Any]], seeds: Sequence[int]) -> str:
    """The sentence that names the pre-trained arm with the highest macro AUROC on the validation phantoms."""
    arms = [arm for arm in arms if arm.kind == "pretraining"]
    complete = {arm.label: results[arm.name] for arm in arms if set(seeds) <= set(results.get(arm.name, {}))}
    if not complete:
        return f"Best arm on validation: {MISSING} (no arm has a result of every seed)."
    means = {
        label: float(np.mean([group_auroc(found[seed]["validation"], "macro") for seed in seeds]))
        for label, found in complete.items()
    }
    means = {label: value for label, value in means.items() if not np.isnan(value)}
    if not means:
        return "Best arm on validation: undefined (a finding group has one class only)."
    best = max(means, key=lambda label: means[label])
    among = f"{len(means)} of {len(arms)} arms with all seeds"
    over = f"over seeds {', '.join(map(str, seeds))}"
    return f"Best arm on validation: **{best}**, mean macro AUROC {means[best]:.3f} {over}, among {among}."


def verdict(
    arms: Sequence[Arm],
    results: Mapping[str, Mapping[int, Any]],
    seeds: Sequence[int],
    differences: Mapping[str, Interval],
) -> str:
    """The sentence that says which arms the defaults have to follow: those of which [`difference`] is above zero."""
    complete = {name for name, found in results.items() if set(seeds) <= set(found)}
    if DEFAULT not in complete:
        return f"Better than the default: {MISSING} (the default has no result of every seed)."
    rivals = [arm for arm in arms if arm.kind == "pretraining" and arm.name in complete - {DEFAULT}]
    found = {arm.label: differences[arm.name] for arm in rivals}
    better = [label for label, interval in found.items() if interval.low > 0]
    worse = [label for label, interval in found.items() if interval.high < 0]
    rest = f"{len(found) - len(better) - len(worse)} of {len(found)}"
    return (
        f"Better than the default on validation: **{'; '.join(better) or 'none'}**. "
        f"Worse: {'; '.join(worse) or 'none'}. Not told apart: {rest}."
    )


def make_table(
    arms: Sequence[Arm],
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> str:
    """
    Markdown with the table, the best arm, and how the numbers came about.

    Args:
        arms (sequence of [`Arm`]): the rows.
        results (`dict`): arm's name -> seed -> contents of its file; the shortcut baseline stands at every seed.
        seeds (sequence of `int`): that were asked for.
        settings (`dict`): contents of `settings.json`.
    """
    found = [result for per_seed in results.values() for result in per_seed.values()]
    num_files = len({(result["arm"], result["seed"]) for result in found})
    rows: list[Sequence[str]] = [HEADER, ("---", *["---:"] * (len(HEADER) - 1))]
    differences = differences_of(arms, results, seeds)
    rows += [table_row(arm, results.get(arm.name, {}), seeds, differences.get(arm.name)) for arm in arms]

    def listed(name: str) -> str:
        return "; ".join(dict.fromkeys(str(result[name]) for result in found)) or MISSING

    budget = settings["budget"]
    compute = (
        f"as many operations as {budget['steps']} steps of the default"
        if "steps" in budget
        else f"{budget['minutes']:g} minutes"
    )
    lines = [
        f"- Commands: `{listed('command')}`",
        f"- Hardware: {listed('hardware')}",
        f"- Commit: {listed('commit')}",
        f"- Phantoms: version {settings['phantom_version']}, "
        + ", ".join(f"{count} {split}" for split, count in settings["counts"].items())
        + f", nominal voxel size {settings['resolution']:g} mm",
        f"- Seeds: {', '.join(map(str, seeds))}. Compute: {compute} in every trained arm, batches of "
        f"{settings['configuration']['training']['per_device_train_batch_size']}.",
        f"- Results: {num_files} files" if found else f"- Results: {MISSING}",
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    legend = LEGEND.format(resamples=NUM_RESAMPLES).replace("\n", " ")
    judged = [best_arm(arms, results, seeds), verdict(arms, results, seeds, differences)]
    parts = ["# Ablation on phantoms", table, *judged, legend, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


__all__ = [
    "HEADER",
    "MISSING",
    "auroc_cell",
    "best_arm",
    "difference",
    "group_auroc",
    "make_table",
    "measurement_cell",
    "table_row",
    "verdict",
]
