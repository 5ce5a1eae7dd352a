# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Convert a MedicalNet ResNet (10 to 200) to a T3DVisionModel folder, and check its outputs against MONAI's network.

Usage, from the root of the repository, with a file of the Hub repository `TencentMedicalNet/MedicalNet-Resnet50`:

    python -m conversion.convert_medicalnet_to_hf --checkpoint resnet_50.pth --depth 50 \
        --output-dir medicalnet-resnet50

The original network runs a stem of stride 2 (the default here) and dilates its last two stages instead of striding.
Like MONAI, the converted model strides: weights and layers are the same, the last grids are coarser.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from conversion.engine import (
    ConversionError,
    ConversionReport,
    load_converted,
    provenance,
    read_state_dict,
    save_converted,
)
from conversion.resnets import ARCHITECTURES, check_outputs, key_rules, resnet_config
from modeling_t3d.configuration_t3d import T3DVisionConfig
from modeling_t3d.modeling_t3d import T3DVisionModel

LICENSE = "mit"


def medicalnet_config(depth: int, stem_stride: int = 2) -> T3DVisionConfig:
    """MedicalNet's variant of each depth: shortcuts without parameters in 18 and 34, without a bias elsewhere."""
    shortcut_type = "A" if depth in (18, 34) else "B"
    return resnet_config(depth, shortcut_type=shortcut_type, downsample_bias=False, stem_stride=stem_stride)


def convert_medicalnet(
    checkpoint: str | Path,
    depth: int,
    output_dir: str | Path,
    stem_stride: int = 2,
    reference: str | Path | None = None,
) -> ConversionReport:
    """Convert, check and save; raises a [`ConversionError`] and writes nothing if anything does not fit."""
    state_dict = read_state_dict(checkpoint)
    model = T3DVisionModel(medicalnet_config(depth, stem_stride)).eval()
    report = load_converted(model, state_dict, key_rules())
    check_outputs(model, state_dict, report, reference)
    model.config.provenance = provenance(
        checkpoint,
        report,
        parent=f"TencentMedicalNet/MedicalNet-Resnet{depth}",
        license=LICENSE,
        data="the medical segmentation sets of MedicalNet (arXiv:1904.00625)",
        note="strides where the original dilates its last two stages",
    )
    save_converted(model, output_dir)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="downloaded file, such as resnet_50_23dataset.pth")
    parser.add_argument("--depth", type=int, required=True, choices=sorted(ARCHITECTURES))
    parser.add_argument("--output-dir", required=True, help="new folder for the model")
    parser.add_argument("--stem-stride", type=int, default=2, help="2 as in the original (default), or 1")
    parser.add_argument("--reference", help="file with `input` and `output` of MONAI's network of these weights")
    options = parser.parse_args(arguments)
    try:
        report = convert_medicalnet(
            options.checkpoint, options.depth, options.output_dir, options.stem_stride, options.reference
        )
    except ConversionError as error:
        sys.exit(f"error: {error}")
    print(f"{report}\nsaved to {options.output_dir}")


if __name__ == "__main__":
    main()
