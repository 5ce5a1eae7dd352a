# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Package metadata: version ranges that were run, and the extras for heavier things."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "modeling_t3d" / "__init__.py").read_text(encoding="utf-8"))[1]

EXTRAS = {
    # Codecs: GDCM covers JPEG lossless, JPEG-LS, JPEG 2000 and RLE. SimpleITK reads NRRD and MetaImage.
    "dicom": ["pydicom>=3.0", "python-gdcm>=3.0.24"],
    "formats": ["SimpleITK>=2.4"],
    # Inflates .nii.gz about twice as fast as zlib.
    "fast": ["isal>=1.7"],
    "store": ["numcodecs>=0.13"],
    "s3": ["s3fs>=2024.2"],
    "parquet": ["pyarrow>=16.0"],
    "cluster": ["dask[distributed]>=2024.8", "tqdm>=4.66"],
    "train": ["tensorboard>=2.16", "pyyaml>=6.0", "tqdm>=4.66"],
    # Experiment trackers beside tensorboard; part of no other extra.
    "track": ["trackio>=0.2", "wandb>=0.19"],
    "eval": ["matplotlib>=3.8", "scikit-learn>=1.4"],
    "dev": [
        "pytest>=8.0",
        "pytest-xdist>=3.5",
        "pytest-timeout>=2.3",
        "hypothesis>=6.100",
        "ruff>=0.14",
        "mypy>=1.13",
        # Transformers' own common tests ask for it.
        "parameterized>=0.9",
        # The readers' tests: images of another library, and DICOM objects and encodings that others write.
        "torchio>=1.0",
        "highdicom>=0.25",
        "pylibjpeg-openjpeg>=2.0",
        # The store's tests: an object storage that speaks S3.
        "s3fs>=2024.2",
        "moto[s3]>=5.0",
        "flask>=3.0",
        "flask-cors>=4.0",
    ],
}
EXTRAS["all"] = sorted(
    {requirement for name, extra in EXTRAS.items() if name not in ("dev", "track") for requirement in extra}
)

setup(
    name="modeling_t3d",
    version=VERSION,
    description="T3D: 3D medical vision-language pre-training for Hugging Face Transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["modeling_t3d", "modeling_t3d.*"]),
    package_data={"modeling_t3d": ["**/*.md", "**/*.json", "**/*.html"]},
    python_requires=">=3.10",
    install_requires=[
        # 2.9's cuDNN breaks 3D convolutions.
        "torch>=2.8,!=2.9.*",
        # 5.19 declares sub-configurations otherwise; from 5.21 on Transformers needs Python 3.11.
        "transformers>=5.20,<6",
        # What that line of Transformers takes.
        "huggingface_hub>=1.31",
        "safetensors>=0.8",
        "tokenizers>=0.23.1",
        "accelerate>=1.10",
        "numpy>=1.26",
        "nibabel>=5.2",
        # Transformers asks for Pillow before it loads any image processor.
        "pillow>=10.0",
        # 1.5.0 refuses torch from 2.7 on.
        "monai>=1.5.1",
        "evaluate>=0.4.3",
        # Stored volumes: addresses and checksums. Evaluate needs both, too. Before 2025.5 a loader process that was
        # forked from one that had read over a network waited for ever.
        "fsspec>=2025.5.1",
        "xxhash>=3.0",
    ],
    extras_require=EXTRAS,
)
