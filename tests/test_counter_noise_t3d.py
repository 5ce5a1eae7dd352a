# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Hashed noise is normal, independent over seeds and places, and a function of its seed."""

import torch

from modeling_t3d.counter_noise_t3d import hash_integers, normal_noise


def test_noise_is_normal_and_independent():
    noise = torch.stack(
        [normal_noise(torch.tensor(seed), 100_001, torch.device("cpu")) for seed in (0, 1, 2, 1 << 31)]
    )
    assert noise.shape == (4, 100_001)
    assert noise.mean(1).abs().max() < 0.02
    assert (noise.std(1) - 1).abs().max() < 0.02
    kurtosis = (noise**4).mean(1)
    assert (kurtosis - 3).abs().max() < 0.15
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.02, "seeds are independent"
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean(1)
    halves = (noise[:, :50_000] * noise[:, 50_001:]).mean(1)
    assert max(neighbours.abs().max(), halves.abs().max()) < 0.02, "and so are places"


def test_noise_depends_on_seed_and_place_alone():
    long, short = (normal_noise(torch.tensor(7), count, torch.device("cpu")) for count in (1000, 1000))
    assert torch.equal(long, short)
    assert not torch.equal(long, normal_noise(torch.tensor(8), 1000, torch.device("cpu")))
    assert len(normal_noise(torch.tensor(7), 33, torch.device("cpu"))) == 33


def test_hashes_spread_over_32_bits():
    hashes = hash_integers(torch.arange(10_000))
    assert len(set(hashes.tolist())) == 10_000
    assert hashes.min() >= 0
    assert hashes.max() < 1 << 32
    bits = (hashes[:, None] >> torch.arange(32)) & 1
    assert (bits.double().mean(dim=0) - 0.5).abs().max() < 0.03
