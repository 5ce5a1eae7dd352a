# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Convert the state dict of a MONAI 3D ResNet to a T3DVisionModel folder, and check its outputs against MONAI.

Usage, from the root of the repository, with a file made by `torch.save(network.state_dict(), "resnet18.pt")`:

    python -m conversion.convert_monai_resnet_to_hf --checkpoint resnet18.pt --depth 18 \
        --license apache-2.0 --parent "my resnet18" --output-dir my-resnet18

Channels, widths, stem kernel and shortcuts are read from the shapes. What shapes do not show must be said: the stride
of the stem (`conv1_t_stride`) and whether it pools (`no_max_pool`). A classifier (`fc`) is left out.

What was said is assumed, and the result says so, unless `--reference` names a file with what the source network gave:

    network.fc = torch.nn.Identity()  # as feed_forward=False does
    view = torch.randn(1, 1, 48, 48, 48)
    with torch.no_grad():
        torch.save({"input": view, "output": network.eval()(view)}, "reference.pt")
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.engine import (
    ConversionError,
    ConversionReport,
    load_converted,
    provenance,
    read_state_dict,
    save_converted,
)
from conversion.resnets import ARCHITECTURES, WIDTHS, check_outputs, key_rules, resnet_config
from modeling_t3d.configuration_t3d import T3DVisionConfig
from modeling_t3d.modeling_t3d import T3DVisionModel

IGNORE = [r"fc\.(weight|bias)"]


def monai_config(
    state_dict: Mapping[str, Any], depth: int, stem_stride: int | list[int] = 1, stem_pool: bool = True
) -> T3DVisionConfig:
    """The configuration that the shapes imply. An absent key keeps MONAI's default: the report will name it."""
    stem = state_dict.get("conv1.weight")
    stem_shape = tuple(stem.shape) if stem is not None else (WIDTHS[0], 1, 7, 7, 7)
    if len(stem_shape) != 5:
        raise ConversionError(f"conv1.weight has shape {stem_shape}; only 3D networks (five axes) can be converted")
    norms = [state_dict.get(f"layer{stage}.0.bn1.weight") for stage in range(1, 5)]
    widths = [width if norm is None else norm.shape[0] for norm, width in zip(norms, WIDTHS, strict=True)]
    return resnet_config(
        depth,
        shortcut_type="B" if any(".downsample." in key for key in state_dict) else "A",
        downsample_bias=any(key.endswith(".downsample.0.bias") for key in state_dict),
        num_channels=stem_shape[1],
        widths=widths,
        stem_kernel_size=list(stem_shape[2:]),
        stem_stride=stem_stride,
        stem_pool=stem_pool,
    )


def convert_monai_resnet(
    checkpoint: str | Path,
    depth: int,
    output_dir: str | Path,
    *,
    license: str,
    parent: str | None = None,
    stem_stride: int | list[int] = 1,
    stem_pool: bool = True,
    reference: str | Path | None = None,
) -> ConversionReport:
    """Convert, check and save; raises a [`ConversionError`] and writes nothing if anything does not fit."""
    state_dict = read_state_dict(checkpoint)
    model = T3DVisionModel(monai_config(state_dict, depth, stem_stride, stem_pool)).eval()
    report = load_converted(model, state_dict, key_rules(), IGNORE)
    check_outputs(model, state_dict, report, reference)
    model.config.provenance = provenance(checkpoint, report, parent=parent or Path(checkpoint).name, license=license)
    save_converted(model, output_dir)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="state dict: a PyTorch file of tensors, or safetensors")
    parser.add_argument("--depth", type=int, required=True, choices=sorted(ARCHITECTURES))
    parser.add_argument("--output-dir", required=True, help="new folder for the model")
    parser.add_argument("--license", required=True, help="of the weights, as the Hub spells it; kept as given")
    parser.add_argument("--parent", help="name of the checkpoint, recorded in the configuration")
    parser.add_argument(
        "--stem-stride", type=int, nargs="+", default=[1], help="MONAI's conv1_t_stride: one, or z y x"
    )
    parser.add_argument("--no-stem-pool", action="store_true", help="MONAI's no_max_pool")
    parser.add_argument("--reference", help="file with `input` and `output` of the source network, to check the stem")
    options = parser.parse_args(arguments)
    stem_stride = options.stem_stride[0] if len(options.stem_stride) == 1 else options.stem_stride
    try:
        report = convert_monai_resnet(
            options.checkpoint,
            options.depth,
            options.output_dir,
            license=options.license,
            parent=options.parent,
            stem_stride=stem_stride,
            stem_pool=not options.no_stem_pool,
            reference=options.reference,
        )
    except ConversionError as error:
        sys.exit(f"error: {error}")
    print(f"{report}\nsaved to {options.output_dir}")


if __name__ == "__main__":
    main()
