# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A quality report as one HTML page that needs nothing else: styles, charts and pictures are inside it."""

import base64
import html
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

from .quality import UNITS, Outlier, QualityReport
from .quality_volume import PICTURE_HEIGHT, VolumeFacts

MAX_OUTLIERS = 24  # pictures of outliers on a page
MAX_SAMPLE = 12  # pictures of other volumes
_MAX_ROWS_LISTED = 30
_MAX_LABELS = 60
_WORDS = {"good": "good", "warning": "look", "error": "mend"}
_VERDICTS = {
    "good": "nothing to mend",
    "warning": "usable; some things deserve a look",
    "error": "to be mended before training",
}


def write_quality_page(report: QualityReport, path: str | Path) -> Path:
    """
    Write a quality report as an HTML page.

    Args:
        report ([`QualityReport`]): from `examine_manifest`.
        path (`str` or `Path`): the `.html` file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8")
    return path


def render(report: QualityReport) -> str:
    """The page as text."""
    template = resources.files(__package__).joinpath("quality_template.html").read_text(encoding="utf-8")
    levels = {check.level for check in report.checks}
    level = next(name for name in ("error", "warning", "good") if name in levels)
    flagged = defaultdict(list)
    for outlier in report.outliers:
        flagged[outlier.number].append(outlier)
    by_number = {facts.number: facts for facts in report.volumes}
    flagged.update(
        {facts.number: [] for facts in report.volumes if facts.not_hounsfield and facts.number not in flagged}
    )
    shown = list(flagged)[:MAX_OUTLIERS]
    others = [facts for facts in report.volumes if facts.number not in flagged]
    sample = [others[place] for place in _spread(len(others), MAX_SAMPLE)]
    return Template(template).substitute(
        name=html.escape(report.name),
        level=level,
        verdict=_VERDICTS[level],
        tiles=_tiles(report),
        checks=_checks(report),
        splits="\n".join(
            _row(f"<td>{html.escape(name)}</td>", *(f"{count:,}" for count in counts))
            for name, counts in report.splits.items()
        ),
        groups=_groups(report),
        labels=_labels(report),
        opened=f"Of {len(report.volumes):,} volumes that were opened and read, and of all reports.",
        charts=_charts(report),
        outlier_text=_outlier_text(report, len(flagged)),
        outliers="\n".join(_figure(by_number[number], flagged[number]) for number in shown),
        sample="\n".join(_figure(facts) for facts in sample) or '<p class="soft">No volume was read.</p>',
    )


def _row(first: str, *cells: str) -> str:
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f"<tr>{first}{numbers}</tr>"


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` places from first to last, evenly."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, limit))}) if count else []


def _tiles(report: QualityReport) -> str:
    values = {
        "rows": report.num_rows,
        "volumes": report.num_volumes,
        "studies": report.num_studies,
        "patients": report.num_patients,
        "with report": len(report.report_words),
        "opened and read": len(report.volumes),
    }
    return "".join(f'<div class="tile"><b>{value:,}</b>{name}</div>' for name, value in values.items())


def _checks(report: QualityReport) -> str:
    order = ("error", "warning", "good")
    lines = []
    for check in sorted(report.checks, key=lambda check: order.index(check.level)):
        listed = ", ".join(map(str, check.rows[:_MAX_ROWS_LISTED]))
        more = f" and {len(check.rows) - _MAX_ROWS_LISTED:,} more" if len(check.rows) > _MAX_ROWS_LISTED else ""
        rows = f'<div class="rows">rows {listed}{more}</div>' if check.rows else ""
        lines.append(
            f'<tr><td>{html.escape(check.name)}</td><td class="state {check.level}">{_WORDS[check.level]}</td>'
            f"<td>{html.escape(check.text)}{rows}</td></tr>"
        )
    return "\n".join(lines)


def _groups(report: QualityReport) -> str:
    per_study = {str(count): studies for count, studies in sorted(report.volumes_per_study.items())}
    cards = [_card("studies by number of volumes", bar_chart(per_study))]
    if report.reconstructions:
        common = dict(report.reconstructions.most_common(12))
        cards.append(_card("volumes by reconstruction (the 12 most common)", bar_chart(common)))
    return "".join(cards)


def _labels(report: QualityReport) -> str:
    if not report.labels:
        return '<p class="soft">The manifest has no labels.</p>'
    head = "<tr><th>finding</th>" + "".join(
        f'<th class="number">{name}</th>' for name in ("present", "absent", "unknown", "share present")
    )
    lines = []
    for name, (present, absent, unknown) in list(report.labels.items())[:_MAX_LABELS]:
        share = f"{present / (present + absent):.1%}" if present + absent else ""
        lines.append(_row(f"<td>{html.escape(name)}</td>", f"{present:,}", f"{absent:,}", f"{unknown:,}", share))
    left = len(report.labels) - _MAX_LABELS
    more = f'<p class="soft">{left} further findings are not shown.</p>' if left > 0 else ""
    return f'<div class="scroll"><table>{head}</tr>{"".join(lines)}</table></div>{more}'


def _charts(report: QualityReport) -> str:
    cards = []
    if report.report_words:
        cards.append(_card("words per report", histogram(report.report_words)))
    titles = {
        "slice spacing": "distance of slices (mm)",
        "pixel spacing": "pixel size (mm)",
        "length": "length of the scan (mm)",
        "tissue": "median soft tissue (HU)",
        "lowest": "1st percentile (HU)",
        "highest": "99.9th percentile (HU)",
    }
    for measure, title in titles.items():
        values = [facts.measures[measure] for facts in report.volumes]
        if values:
            cards.append(_card(title, histogram(values)))
    return "".join(cards)


def _card(title: str, chart: str) -> str:
    return f'<div class="card"><h3>{html.escape(title)}</h3>{chart}</div>'


def histogram(values: Sequence[float], bins: int = 24) -> str:
    """SVG histogram with its ends and its highest count written beside it."""
    low, high = float(min(values)), float(max(values))
    if low == high:
        return f'<p class="soft">all {len(values):,} are {low:g}</p>'
    counts, _ = np.histogram(values, bins=bins, range=(low, high))
    top, width, height = int(counts.max()), 300, 92
    step = width / bins
    bars = "".join(
        f'<rect x="{place * step:.1f}" y="{12 + (height - 12) * (1 - count / top):.1f}" width="{step - 1:.1f}" '
        f'height="{(height - 12) * count / top:.1f}"/>'
        for place, count in enumerate(counts)
        if count
    )
    median = f"median {float(np.median(values)):.4g}"
    return (
        f'<svg viewBox="0 0 {width} {height + 18}" role="img" aria-label="histogram, {median}">'
        f'<text x="0" y="9">{top:,}</text>{bars}<line x1="0" y1="{height}" x2="{width}" y2="{height}"/>'
        f'<text x="0" y="{height + 13}">{low:.4g}</text>'
        f'<text x="{width / 2}" y="{height + 13}" text-anchor="middle">{median}</text>'
        f'<text x="{width}" y="{height + 13}" text-anchor="end">{high:.4g}</text></svg>'
    )


def bar_chart(counts: dict[str, int]) -> str:
    """SVG of one horizontal bar per name."""
    if not counts:
        return '<p class="soft">none</p>'
    top, line = max(counts.values()), 20
    bars = "".join(
        f'<text x="0" y="{place * line + 14}">{html.escape(name[:18])}</text>'
        f'<rect x="112" y="{place * line + 4}" width="{max(1.0, 130 * count / top):.1f}" height="13"/>'
        f'<text x="{118 + max(1.0, 130 * count / top):.1f}" y="{place * line + 14}">{count:,}</text>'
        for place, (name, count) in enumerate(counts.items())
    )
    return f'<svg viewBox="0 0 300 {len(counts) * line + 4}" role="img" aria-label="bar chart">{bars}</svg>'


def _outlier_text(report: QualityReport, count: int) -> str:
    if not count:
        return "No volume lies far from the others."
    shown = f" The {MAX_OUTLIERS} farthest are shown." if count > MAX_OUTLIERS else ""
    return (
        f"{count:,} volumes differ much from the median of the data set, or hold no HU; why is said below each.{shown}"
    )


def _figure(facts: VolumeFacts, outliers: Sequence[Outlier] = ()) -> str:
    picture = base64.b64encode(facts.picture).decode()
    depth, height, width = facts.shape
    spacing = " x ".join(f"{value:.3g}" for value in facts.spacing)
    flags = "".join(
        f'<div class="flag">{one.measure} {one.value:.4g} {UNITS[one.measure]}, usual {one.usual:.4g}</div>'
        for one in outliers
    )
    warnings = "".join(f'<div class="flag">{html.escape(text)}</div>' for text in facts.warnings)
    wrong = f'<div class="flag">{html.escape(facts.not_hounsfield)}</div>' if facts.not_hounsfield else ""
    return (
        f'<figure><div class="film"><img height="{PICTURE_HEIGHT}" alt="middle coronal and axial slice of row '
        f'{facts.number}" src="data:image/png;base64,{picture}"></div><figcaption><b>row {facts.number}</b> '
        f'<span class="soft">{depth} x {height} x {width} voxels, {spacing} mm (z, y, x)</span>'
        f"{flags}{wrong}{warnings}</figcaption></figure>"
    )


__all__ = ["bar_chart", "histogram", "render", "write_quality_page"]
