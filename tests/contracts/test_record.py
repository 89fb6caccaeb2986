"""What must not change: recorded at commit 5fd39e9, before the tree of rooms, and kept."""

import hashlib
import json
import math

import pytest
import torch
from tiny import Images

from carim_aug import LocationPrior, SyntheticNoduleMix

SETTINGS = {
    "28cd90924f827ac280ab2a36f5e7258078cd837b353bc5cf7993fa1add2758fe": dict(p=0.5, seed=5, insertion="whole"),
    "beb5b6869abe6972b6ea4a1d21f05aa183dbd5f4b3e18d001565076ba1580a6a": dict(
        p={"Nodule": 0.3, "No Finding": 0.2}, seed=2**63 + 7, insertion="whole"
    ),
    "792e15cde4089d0a94602ef726c49602eb8e790c54378bf776b3db397a60fe3d": dict(p=0.4, seed=11, strength=(0.5, 1.5)),
    "ed4e21663b267932b17d033ee6fe7184b765f7b11b61f77bafa4c7359eb93409": dict(
        n_synthetic={"Nodule": 20, "No Finding": 9}, seed=3, insertion="whole"
    ),
    "aa6db2d385aeec87da66a61ccd39035ea375e941aa605ad8a038670d2c09edbf": dict(sampling_strategy={"Nodule": 40}, seed=4),
    "63771868c884aa2296694e87374025ba002252496cdcec9a333ddc7905a4a52c": dict(sampling_strategy=1.0, seed=1),
}
"""SHA-256 of all decisions of three epochs, before any image is looked at, to the mix that makes them."""

BOXES = [[300, 400, 340, 440], [620, 300, 660, 350], [350, 700, 420, 760], [700, 650, 760, 700], [200, 500, 215, 516]]
LOG_PROB = ["0x1.aed2ed6090f5dp+0", "0x1.186ece04db643p-1", "0x1.2d88bc2fe8379p-2", "0x1.f9e3e52d89c10p-1"]
LOG_PROB += ["-0x1.1965d45e015e1p+1"]
LOG_PROB_COUNT = [-0.3627021413509837, -1.7143576081597278, -2.567253597486275, -3.049534979546967, -math.inf]
WEIGHTS = "d5044c31ef57e2f2681666eb10fe32bc92807ef29457397d173990d734794102"
PICTURES = (  # mean and std, then pixels by row and column
    ((0.28264003, 0.48805643), {(20, 30): 0.33862376, (64, 40): -0.34086296, (100, 90): 0.77524078}),
    ((0.45098726, 0.14449804), {(54, 95): 0.72096962, (51, 93): 0.45543784, (58, 97): 0.56317717}),
    ((0.45030670, 0.14374004), {(85, 119): 0.32528690, (78, 117): 0.54301709, (90, 122): 0.40666693}),
)


@pytest.mark.parametrize("digest", SETTINGS, ids=range(len(SETTINGS)))
def test_decisions_are_the_recorded_ones(digest):
    images, rows = Images(64), []
    planned = SyntheticNoduleMix.from_pretrained(**SETTINGS[digest]).wrap(images).planned
    for epoch in (0, 1, 7):
        for i in range(len(planned)):
            one = planned.decide((planned.settings.seed, epoch, i), i < 64 and images.targets[i] == 0)
            parts = one.class_name, one.noise_seed, one.boxes.tobytes().hex(), one.background, one.strength
            rows.append([list(one.key), *parts])
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == digest


def test_the_priors_density_and_the_weights_hash_are_the_recorded_ones():
    prior = LocationPrior.bundled()
    expected = [float.fromhex(value) for value in LOG_PROB]
    assert prior.log_prob(torch.tensor(BOXES, dtype=torch.float64), 1024).tolist() == pytest.approx(expected, rel=1e-12)
    assert [prior.log_prob_count(k) for k in range(1, 6)] == pytest.approx(LOG_PROB_COUNT)
    assert SyntheticNoduleMix.from_pretrained().weights_hash == WEIGHTS


def test_a_whole_image_and_two_grafts_are_the_recorded_ones():
    mix = SyntheticNoduleMix.from_pretrained(seed=7, placement="prior", p=1.0)
    seen, random = [mix.regenerate((7, 0, 3))[0][0]], torch.Generator().manual_seed(0)
    for size in ((128, 128), (200, 160)):
        mix.set_epoch(0)
        background = torch.rand(1, 1, *size, generator=random) * 0.5 + 0.2
        seen.append(mix(background, torch.zeros(1, dtype=torch.int64))[0][0, 0])
    for found, (moments, pixels) in zip(seen, PICTURES, strict=True):
        values = found.double().mean().item(), found.double().std(correction=0).item()
        assert values == pytest.approx(moments, abs=1e-5)  # roundings differ between processors
        assert {place: found[place].item() for place in pixels} == pytest.approx(pixels, abs=1e-5)
