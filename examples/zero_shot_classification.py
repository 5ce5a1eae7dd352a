# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""
Score free-text labels on a CT scan with a trained T3D model.

    python examples/zero_shot_classification.py --model outputs/quickstart/run/model --volume scan.nii.gz \
        --labels "pleural effusion" "lung nodule"

The volume may be NIfTI, NRRD, MetaImage or a folder with one DICOM series. Not a medical device.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, pipeline

from modeling_t3d import T3DConfig
from modeling_t3d.geometry_t3d import VolumeError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score free-text labels on a CT scan with a trained T3D model.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a T3D checkpoint")
    parser.add_argument("--volume", required=True, nargs="+", help="one or more scans: files or DICOM folders")
    parser.add_argument("--labels", required=True, nargs="+", help="names to score")
    parser.add_argument(
        "--hypothesis-template",
        nargs="+",
        metavar="TEMPLATE",
        help="how a label becomes a prompt, {} being its name: one template, or two for present and absent (default: "
        "those of the checkpoint)",
    )
    parser.add_argument("--views", help="'grid' or a number of random local views (default: what the model needs)")
    parser.add_argument("--view-batch-size", type=int, default=8, help="local views at once; bounds memory")
    scoring = parser.add_mutually_exclusive_group()
    scoring.add_argument(
        "--multi-label",
        action="store_true",
        default=True,
        help="labels by themselves, present against absent (default)",
    )
    scoring.add_argument("--softmax", dest="multi_label", action="store_false", help="labels compete: a softmax")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: the first accelerator, else the CPU)")
    return parser.parse_args()


def refuse_other_models(model: str) -> None:
    """Exit with one line for what is no checkpoint of a dual encoder, which alone can compare scans with texts."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        hint = f"; did you mean {folder / 'model'}?" if (folder / "model" / "config.json").is_file() else ""
        sys.exit(f"{model}: holds no checkpoint, as there is no config.json in it{hint}")
    try:
        config = AutoConfig.from_pretrained(model)
    except OSError:  # as Transformers raises it for a folder that is none and a Hub that has no such model
        sys.exit(f"{model}: neither a folder with a checkpoint nor a model that the Hub gives here")
    if not isinstance(config, T3DConfig):
        sys.exit(
            f"{model}: a model of type {config.model_type!r} knows no texts; give a T3DModel or T3DForPreTraining"
        )


def main() -> int:
    """Load, score, print one table per scan; a scan that cannot be read is named, and the others go on."""
    arguments = parse_arguments()
    views = int(arguments.views) if arguments.views and arguments.views.isdecimal() else arguments.views
    if arguments.device and arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"--device {arguments.device}: this torch finds no CUDA device; leave --device out or give cpu")
    refuse_other_models(arguments.model)
    classifier = pipeline("zero-shot-volume-classification", model=arguments.model, device=arguments.device)
    template = arguments.hypothesis_template
    width = max(map(len, arguments.labels))
    status = 0
    for path in arguments.volume:
        try:
            scores = classifier(
                path,
                candidate_labels=arguments.labels,
                hypothesis_template=template[0] if template and len(template) == 1 else template,
                multi_label=arguments.multi_label,
                views=views,
                view_batch_size=arguments.view_batch_size,
            )
        except VolumeError as error:
            print(error, file=sys.stderr)
            status = 1
            continue
        except ValueError as error:  # of the settings, which are the same for every scan
            sys.exit(str(error))
        print(f"\n{path}")
        print(f"  {'label':<{width}}  score")
        for entry in scores:
            print(f"  {entry['label']:<{width}}  {entry['score']:.3f}")

    return status


if __name__ == "__main__":
    sys.exit(main())
