# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Random numbers that are a function of a seed and a place: the same on every device, and none of a generator's."""

import math

import torch

_MASK = 0xFFFFFFFF


def hash_integers(numbers: torch.Tensor) -> torch.Tensor:
    """
    Integers of 0 to 33 bits to ones of 32, in int64, mixed by two rounds of multiplying and shifting (the finaliser of
    MurmurHash3).
    """
    numbers = (numbers ^ (numbers >> 16)) & _MASK
    for factor, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        numbers = (numbers * factor) & _MASK
        numbers = numbers ^ (numbers >> shift)
    return numbers


def normal_noise(seed: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    """
    Standard normal numbers from a seed that stays on its device: counters are hashed, pairs of hashes transformed.

    Args:
        seed (`torch.Tensor`, int64, no axes): 33 bits.
        count (`int`): how many.
        device (`torch.device`): where.

    Returns:
        `torch.Tensor` of shape `(count,)`, float32.
    """
    counter = torch.arange((count + 1) // 2, device=device)
    first, second = (hash_integers(counter ^ hash_integers(seed * 2 + half)) for half in (0, 1))
    # Box and Muller: a radius and an angle; half a step keeps the logarithm finite.
    radius = torch.sqrt(-2 * torch.log((first.to(torch.float32) + 0.5) / 2**32))
    angle = second.to(torch.float32) * (2 * math.pi / 2**32)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count]


__all__ = ["hash_integers", "normal_noise"]
