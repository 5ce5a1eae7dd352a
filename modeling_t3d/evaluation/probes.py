# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Linear probes on frozen features, the shortcut baseline (headers and global histogram), and a study-identity probe.

They say what simple features already know: a model is worth what it adds to them.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .statistics import area_under_roc, area_under_roc_per_finding, macro_mean

# HU edges of the global histogram: air, fat, soft tissue and contrast in 25 to 100 HU steps; the ends are open.
HISTOGRAM_EDGES = (
    *range(-1000, -200, 100),
    *range(-200, 300, 25),
    *range(300, 1001, 100),
)
MAX_HISTOGRAM_VOXELS = 2_000_000
DEFAULT_INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)


def shortcut_feature_names() -> list[str]:
    """Names of the entries of [`shortcut_features`], in order."""
    header = [f"spacing_{axis}" for axis in "zyx"] + [f"size_{axis}" for axis in "zyx"]
    header += [f"extent_{axis}" for axis in "zyx"]
    orientation = [f"array_axis_{axis}_along_{world}" for axis in range(3) for world in ("x", "y", "z")]
    return header + orientation + [f"histogram_{number}" for number in range(len(HISTOGRAM_EDGES) + 1)]


def shortcut_features(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """What a model could know of a scan without looking at anatomy: header geometry and the global HU histogram.

    Args:
        array (`np.ndarray` of 3 dimensions): HU, in the file's own axis order.
        affine (`np.ndarray` of shape `(4, 4)`): from indices in that order to RAS+ world (x, y, z) mm.

    Returns:
        `np.ndarray` of shape `(num_features,)`, float64: log spacing (mm), log size (voxels) and log extent (mm) along
        world z, y, x; the signed world direction of each array axis; the share of voxels per HU bin.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.evaluation.probes import shortcut_feature_names, shortcut_features
    >>> features = shortcut_features(np.zeros((8, 8, 4)), np.diag([0.5, 0.5, 2.0, 1.0]))
    >>> round(np.exp(dict(zip(shortcut_feature_names(), features))["extent_z"]), 6).item()
    8.0

    ```
    """
    linear = np.asarray(affine, dtype=np.float64)[:3, :3]
    spacing = np.linalg.norm(linear, axis=0)
    direction = linear / spacing  # (world axis, array axis)
    # Array axis that runs nearest along each world axis, in the order z, y, x.
    nearest = [int(np.argmax(np.abs(direction[world]))) for world in (2, 1, 0)]
    size = np.array(array.shape, dtype=np.float64)
    geometry = [spacing[nearest], size[nearest], (spacing * size)[nearest]]
    stride = max(1, -(-array.size // MAX_HISTOGRAM_VOXELS))
    bins = np.digitize(np.ravel(array)[::stride], HISTOGRAM_EDGES)
    histogram = np.bincount(bins, minlength=len(HISTOGRAM_EDGES) + 1) / len(bins)
    return np.concatenate([np.log(np.concatenate(geometry)), np.round(direction.T, 3).ravel(), histogram])


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression per finding on standardised features.

    Attributes:
        weight (`np.ndarray` of shape `(num_features, num_findings)`).
        bias (`np.ndarray` of shape `(num_findings,)`).
        mean, scale (`np.ndarray` of shape `(num_features,)`): of the training features.
    """

    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        """Log-odds of shape (num_rows, num_findings) for features of shape (num_rows, num_features)."""
        standardised = (np.asarray(features, dtype=np.float64) - self.mean) / self.scale
        return standardised @ self.weight + self.bias


def fit_linear_probe(
    features: np.ndarray, labels: np.ndarray, *, inverse_penalty: float = 1.0, max_iterations: int = 500
) -> LinearProbe:
    """Fit one L2-regularised logistic regression per finding, all at once, to convergence.

    Minimises per finding `sum_rows log-loss + ||w||^2 / (2 * inverse_penalty)` on standardised features; the bias is
    free. The problem is strictly convex in w, so the result does not depend on a seed.

    Args:
        features (`np.ndarray` of shape `(num_rows, num_features)`): constant features get weight zero.
        labels (`np.ndarray` of shape `(num_rows, num_findings)`): 0, 1 or nan (unknown: the row is left out there).
        inverse_penalty: larger means less regularisation (the C of the usual notation).
        max_iterations: of L-BFGS.
    """
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if features.ndim != 2 or labels.ndim != 2 or len(features) != len(labels):
        raise ValueError(
            f"features {features.shape} and labels {labels.shape} must be (num_rows, num_features) and "
            "(num_rows, num_findings)"
        )
    if not np.isfinite(features).all():
        raise ValueError("features hold values that are not finite")
    mean, scale = features.mean(axis=0), features.std(axis=0)
    # Rounding leaves a constant feature a spread of some ulp, which would blow up into noise.
    scale = np.where(scale > 1e-9 * np.maximum(1.0, np.abs(mean)), scale, np.inf)
    inputs = torch.from_numpy((features - mean) / scale)
    # A finding with one class has no finite optimum: it gets the constant that the rows show.
    counts = (~np.isnan(labels)).sum(axis=0)
    prevalence = np.divide(np.nansum(labels, axis=0), counts, out=np.full(len(counts), 0.5), where=counts > 0)
    fitted = (prevalence > 0) & (prevalence < 1) & (counts > 0)
    start = np.log(np.clip(prevalence, 1e-9, 1)) - np.log(np.clip(1 - prevalence, 1e-9, 1))
    known = torch.from_numpy(~np.isnan(labels[:, fitted])).double()
    targets = torch.from_numpy(np.nan_to_num(labels[:, fitted]))
    weight = torch.zeros(inputs.shape[1], targets.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.from_numpy(start[fitted]).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-6 * max(1.0, len(features) ** 0.5),
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            inputs @ weight + bias, targets, weight=known, reduction="sum"
        )
        loss = losses + weight.square().sum() / (2 * inverse_penalty)
        loss.backward()
        return loss

    if fitted.any():
        with torch.enable_grad():
            optimizer.step(closure)
    weights = np.zeros((features.shape[1], labels.shape[1]))
    weights[:, fitted], start[fitted] = weight.detach().numpy(), bias.detach().numpy()
    return LinearProbe(weight=weights, bias=start, mean=mean, scale=scale)


def choose_inverse_penalty(
    features: np.ndarray,
    labels: np.ndarray,
    patient_ids: Sequence[Hashable],
    *,
    candidates: Sequence[float] = DEFAULT_INVERSE_PENALTIES,
    seed: int = 0,
) -> float:
    """The candidate with the best macro AUROC on a fifth of the patients, held out of the *training* rows.

    The test rows are never touched; with too few patients to hold out any, or no finding defined, the middle candidate
    is returned.
    """
    patients = list(dict.fromkeys(patient_ids))
    shuffled = np.random.default_rng(seed).permutation(len(patients))
    held_out = {patients[number] for number in shuffled[: len(patients) // 5]}
    inner = np.array([patient not in held_out for patient in patient_ids])
    features, labels = np.asarray(features), np.asarray(labels, dtype=np.float64)
    best, best_value = candidates[len(candidates) // 2], -np.inf
    if not held_out:
        return best
    for candidate in candidates:
        probe = fit_linear_probe(features[inner], labels[inner], inverse_penalty=candidate)
        value = macro_mean(area_under_roc_per_finding(labels[~inner], probe.log_odds(features[~inner]))).mean
        if value > best_value:
            best, best_value = candidate, value
    return best


def probe_findings(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    *,
    train_patient_ids: Sequence[Hashable],
    test_patient_ids: Sequence[Hashable],
    inverse_penalty: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Log-odds (num_test_rows, num_findings) of a linear probe fitted on training rows.

    Serves the shortcut baseline (with [`shortcut_features`]) and the probe of frozen embeddings alike. The penalty is
    chosen on held-out *training* patients unless it is given.
    """
    shared = set(train_patient_ids) & set(test_patient_ids)
    if shared:
        raise ValueError(f"{len(shared)} patients are in both the training and the test rows: split by patient")
    if inverse_penalty is None:
        inverse_penalty = choose_inverse_penalty(train_features, train_labels, train_patient_ids, seed=seed)
    return fit_linear_probe(train_features, train_labels, inverse_penalty=inverse_penalty).log_odds(test_features)


@dataclass(frozen=True)
class StudyIdentity:
    """How well embeddings of views tell which study they come from.

    Attributes:
        nearest_neighbour_accuracy: share of views whose most similar other view is of the same study.
        chance: expected value of that share for embeddings without information.
        area_under_roc: of cosine similarity for "same study" against "other study" over all pairs of views.
        num_views: valid views compared.
        num_studies: studies with at least two valid views.
    """

    nearest_neighbour_accuracy: float
    chance: float
    area_under_roc: float
    num_views: int
    num_studies: int


def study_identity(
    view_embeds: np.ndarray,
    study_ids: Sequence[Hashable],
    view_mask: np.ndarray | None = None,
) -> StudyIdentity:
    """Probe for study identity: do views of one study find each other among views of all studies?

    Args:
        view_embeds (`np.ndarray` of shape `(num_volumes, S, dim)`): embeddings of S local views per volume, pooled
            without a report (mean over tokens) or with one common query: a report of their own would leak identity.
        study_ids: per volume.
        view_mask (`np.ndarray` of shape `(num_volumes, S)`, *optional*): valid views.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_t3d.evaluation.probes import study_identity
    >>> embeds = np.repeat(np.eye(3)[:, None], 2, axis=1)  # two views per study, equal within and orthogonal across
    >>> study_identity(embeds, ["a", "b", "c"]).nearest_neighbour_accuracy
    1.0

    ```
    """
    view_embeds = np.asarray(view_embeds, dtype=np.float64)
    if view_embeds.ndim != 3 or len(view_embeds) != len(study_ids):
        raise ValueError(
            f"view_embeds must have shape (num_volumes, S, dim) with one study id per volume, got {view_embeds.shape} "
            f"and {len(study_ids)} ids"
        )
    mask = np.ones(view_embeds.shape[:2], dtype=bool) if view_mask is None else np.asarray(view_mask, dtype=bool)
    numbers: dict[Hashable, int] = {}
    studies = np.array([numbers.setdefault(study, len(numbers)) for study in study_ids])
    owner = np.repeat(studies, mask.sum(axis=1))
    embeds = view_embeds[mask]
    # A view without a sibling can never be right: it stays a candidate but asks nothing.
    counts = np.bincount(owner, minlength=len(numbers))
    asks = np.flatnonzero(counts[owner] >= 2)
    if not len(asks) or len(counts[counts > 0]) < 2:
        raise ValueError("study identity needs views of at least two studies, one of them with two or more")
    embeds = embeds / np.maximum(np.linalg.norm(embeds, axis=1, keepdims=True), 1e-12)
    similarity = embeds @ embeds.T
    same = owner[:, None] == owner
    np.fill_diagonal(similarity, -np.inf)
    nearest = similarity[asks].max(axis=1, keepdims=True)
    tied = similarity[asks] >= nearest
    hits = (tied & same[asks]).sum(axis=1) / tied.sum(axis=1)
    upper = np.triu_indices(len(embeds), k=1)
    return StudyIdentity(
        nearest_neighbour_accuracy=float(hits.mean()),
        chance=float(((counts[owner[asks]] - 1) / (len(embeds) - 1)).mean()),
        area_under_roc=area_under_roc(same[upper], similarity[upper]),
        num_views=len(embeds),
        num_studies=int((counts >= 2).sum()),
    )


__all__ = [
    "LinearProbe",
    "StudyIdentity",
    "choose_inverse_penalty",
    "fit_linear_probe",
    "probe_findings",
    "shortcut_feature_names",
    "shortcut_features",
    "study_identity",
]
