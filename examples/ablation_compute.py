# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""How many steps of an arm compute as much as so many steps of the default, on whatever machine.

Minutes give a slower or busier machine fewer steps, so that results of several sessions could not stand in one table.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ablation_arms import Arm, build_classifier_trainer, load_splits
from pretrain import build_trainer

from modeling_t3d import T3DImageProcessor
from modeling_t3d.training.arguments import load_configuration
from modeling_t3d.training.profiling import count_operations


@cache
def operations_per_step(arm: Arm, config: Path, overrides: tuple[str, ...]) -> int:
    """Floating-point operations of the first step of an arm, of prepared volumes."""
    settings = load_configuration(config, [*overrides, *arm.overrides])
    if arm.kind == "supervised":
        train = load_splits(settings, T3DImageProcessor(**settings.image_processor))["train"]
        return count_operations(build_classifier_trainer(settings, train))
    trainer, _ = build_trainer(settings)
    return count_operations(trainer)


def steps_of_equal_compute(arm: Arm, default: Arm, num_steps: int, config: Path, overrides: Sequence[str]) -> int:
    """
    Steps of an arm that take as many operations as `num_steps` of the default.

    Args:
        arm, default ([`Arm`]): pre-trained or supervised.
        num_steps (`int`): of the default.
        config (`Path`), overrides (sequence of `str`): shared by all arms, so that every seed has the same steps.
    """
    of_arm, of_default = (operations_per_step(each, config, tuple(overrides)) for each in (arm, default))
    return max(1, round(num_steps * of_default / of_arm))


__all__ = ["operations_per_step", "steps_of_equal_compute"]
