# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Thorax-abdomen CT phantoms with masks, findings and reports, for training without patient data: the public names.

The generator is deterministic and versioned: the same seed and `PHANTOM_VERSION` give the same bits.
"""

from .phantom_anatomy import ORGANS
from .phantom_files import PhantomFolderError, phantom_version, write_phantoms
from .phantom_findings import FINDINGS, FindingSpec, Lesion
from .phantom_reports import train_phantom_tokenizer
from .phantom_scan import ScanSettings
from .phantom_studies import (
    PHANTOM_VERSION,
    SPLIT_STARTS,
    Phantom,
    generate_phantom,
    patient_number,
    phantom_seeds,
    phantom_split,
)
from .phantom_wordings import EVALUATION_PROMPTS

__all__ = [
    "EVALUATION_PROMPTS",
    "FINDINGS",
    "ORGANS",
    "PHANTOM_VERSION",
    "SPLIT_STARTS",
    "FindingSpec",
    "Lesion",
    "Phantom",
    "PhantomFolderError",
    "ScanSettings",
    "generate_phantom",
    "patient_number",
    "phantom_seeds",
    "phantom_split",
    "phantom_version",
    "train_phantom_tokenizer",
    "write_phantoms",
]
