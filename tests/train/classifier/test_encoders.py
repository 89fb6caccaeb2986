"""Encoders for FID and KID: losses on paper, training on phantom chests, files."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F

from train.classifier.encoders import (
    KINDS,
    PRESETS,
    TEMPERATURE,
    Encoder,
    contrast_loss,
    features_of,
    finding_probe,
    load_encoder,
    patient_match,
    train_encoder,
    train_encoders,
    views_of,
)
from train.common.images import read_images
from train.common.run import RunError


@pytest.fixture(scope="module")
def folder(phantom_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoders")
    assert train_encoders(PRESETS["tiny"], data=phantom_data, out=out) == [out / f"{k}.safetensors" for k in KINDS]
    return out


def test_contrast_loss_worked_on_paper():
    views = torch.eye(2)
    # Alike and two others at a right angle: -log(e^(1/t) / (e^(1/t) + 2)).
    wanted = -math.log(math.exp(1 / TEMPERATURE) / (math.exp(1 / TEMPERATURE) + 2))
    assert contrast_loss(views, views * 3).item() == pytest.approx(wanted, abs=1e-6)
    assert contrast_loss(views, views.flip(0)).item() > 3


def test_views_are_parts_of_the_image_keyed_by_the_stream():
    ramp = torch.linspace(-1, 1, 64)[None, None, None].expand(5, 1, 64, 64).contiguous()
    views = views_of(ramp, torch.Generator().manual_seed(0))
    assert torch.equal(views, views_of(ramp, torch.Generator().manual_seed(0)))
    assert views.shape == ramp.shape and views.abs().max() <= 1
    slope = (views[..., 33] - views[..., 31])[:, 0, 32] / (ramp[..., 33] - ramp[..., 31])[:, 0, 32]
    assert (slope > 0.34).all() and (slope < 1.31).all()  # half to all of the width, contrast 0.7 to 1.3


@pytest.mark.train
@pytest.mark.parametrize("kind", KINDS)
def test_encoder_of_a_file_gives_the_features_that_were_trained(kind, folder, phantom_data):
    encoder = load_encoder(folder / f"{kind}.safetensors")
    images = read_images(phantom_data, "val", 32)
    features = features_of(encoder, images.images)
    assert features.shape == (12, encoder.dim) and features.isfinite().all() and features.std(0).max() > 0
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    # Larger images are reduced; floats in [-1, 1] are what uint8 images stand for.
    as_float = images.images.float() / 127.5 - 1
    assert torch.allclose(features_of(encoder, as_float, batch=5), features, atol=1e-4)
    twice = as_float.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    reduced = F.interpolate(twice, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)
    assert torch.allclose(features_of(encoder, twice), features_of(encoder, reduced), atol=1e-5)


@pytest.mark.train
def test_same_seed_same_encoder_no_random_state_is_moved_and_what_is_there_is_kept(folder, phantom_data):
    images, before = read_images(phantom_data, "train", 32), torch.get_rng_state()
    again = train_encoder("contrast", images, PRESETS["tiny"])
    assert torch.equal(torch.get_rng_state(), before)
    there = load_encoder(folder / "contrast.safetensors")
    assert all(torch.equal(v, there.state_dict()[k]) for k, v in again.state_dict().items())
    stamps = [path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))]
    train_encoders(PRESETS["tiny"], data=phantom_data, out=folder)
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))] == stamps
    figures = json.loads((folder / "report.json").read_text())
    assert set(figures) == set(KINDS) and 0 <= figures["findings"]["any_finding_auc"] <= 1


def test_patient_match_and_probe_on_paper():
    features = torch.tensor([[1.0, 0], [1, 0.1], [-1, 0], [-1, 0.2], [0, 3]])
    assert patient_match(features, torch.tensor([1, 1, 2, 2, 3])) == (1.0, 0.25)
    assert patient_match(features, torch.tensor([1, 2, 1, 2, 3]))[0] == 0
    assert all(map(math.isnan, patient_match(features, torch.arange(5))))
    rng = torch.Generator().manual_seed(0)
    features, labels = torch.randn(400, 8, generator=rng), torch.zeros(400, 14)
    labels[:, 3] = (features[:, 0] > 0).float()  # linear in the features
    train = features[:200], labels[:200]
    assert finding_probe(train, (features[200:], labels[200:])) > 0.95
    assert abs(finding_probe(train, (torch.randn(200, 8, generator=rng), labels[200:])) - 0.5) < 0.12


@pytest.mark.train
def test_bad_input_is_named(folder, phantom_data, tmp_path):
    with pytest.raises(ValueError, match="kind must be one of .*, got 'inception'"):
        Encoder("inception")
    with pytest.raises(ValueError, match=r"images must be float \(B, 1, H, W\)"):
        load_encoder(folder / "contrast.safetensors")(torch.zeros(2, 3, 32, 32))
    images = read_images(phantom_data, "train", 32)
    with pytest.raises(RunError, match="at least a batch of 64, got 24"):
        train_encoder("findings", images, dataclasses.replace(PRESETS["tiny"], batch=64))
    arrays = load_file(folder / "contrast.safetensors")
    save_file(arrays, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must be a file that train.classifier.encoders wrote, got format None"):
        load_encoder(tmp_path / "other.safetensors")
    damaged = bytearray((folder / "contrast.safetensors").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match="does not match its own SHA-256"):
        load_encoder(tmp_path / "damaged.safetensors")
