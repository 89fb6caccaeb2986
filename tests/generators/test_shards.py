"""Weights in several files: split, joined, and named when one is missing, damaged or of other weights."""

import json

import numpy as np
import pytest
import torch

from carim_aug import NoduleGenerator, WeightsError, shards
from carim_aug.generators.shards import INDEX, LARGEST


@pytest.fixture
def small_files(monkeypatch):
    # Files of 60 kB: the tiny generator needs several, and its largest tensor is cut.
    monkeypatch.setattr(shards, "LARGEST", 60_000)


def _generator(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NoduleGenerator("tiny").eval()


def test_weights_that_fit_stay_one_file(tmp_path):
    _generator().save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert LARGEST == 16_000_000


@pytest.mark.usefixtures("small_files")
def test_larger_weights_are_split_and_joined_again(tmp_path):
    generator = _generator()
    generator.save_pretrained(tmp_path, training_data="none")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    count = len(files)
    assert [p.name for p in files] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert count >= 3 and max(p.stat().st_size for p in files) <= 60_000
    assert not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / INDEX).read_text())
    assert any("[0:" in name for name in index["weight_map"]) and set(index["weight_map"].values()) == {
        p.name for p in files
    }
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in generator.state_dict().values())
    again = NoduleGenerator.from_pretrained(tmp_path)
    assert again.weights_hash == generator.weights_hash and again.provenance["training_data"] == "none"
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), again.parameters(), strict=True))


@pytest.mark.usefixtures("small_files")
def test_each_form_takes_the_place_of_the_other(tmp_path, monkeypatch):
    first, second = _generator(0), _generator(1)
    first.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "LARGEST", 16_000_000)
        second.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / INDEX).exists()
    assert NoduleGenerator.from_pretrained(tmp_path).weights_hash == second.weights_hash
    first.save_pretrained(tmp_path)
    assert NoduleGenerator.from_pretrained(tmp_path).weights_hash == first.weights_hash


@pytest.mark.usefixtures("small_files")
def test_a_missing_or_damaged_file_is_named(tmp_path):
    _generator().save_pretrained(tmp_path)
    second = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = second.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    second.write_bytes(flipped)
    with pytest.raises(WeightsError, match=f"{second.name} does not match its own SHA-256"):
        NoduleGenerator.from_pretrained(tmp_path)
    second.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match=f"{second.name} is truncated or damaged"):
        NoduleGenerator.from_pretrained(tmp_path)
    second.unlink()
    with pytest.raises(WeightsError, match=f"has no {second.name}"):
        NoduleGenerator.from_pretrained(tmp_path)


@pytest.mark.usefixtures("small_files")
def test_files_of_other_weights_are_refused(tmp_path):
    _generator(0).save_pretrained(tmp_path / "a")
    _generator(1).save_pretrained(tmp_path / "b")
    name = sorted((tmp_path / "a").glob("model-*.safetensors"))[0].name
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(WeightsError, match=f"{name} is of other weights than {INDEX}"):
        NoduleGenerator.from_pretrained(tmp_path / "a")


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": {}}', '{"metadata": {"tensors_sha256": ""}, "weight_map": 1}']
)
def test_a_broken_index_is_named(tmp_path, text):
    _generator().save_pretrained(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(WeightsError, match="is no index of weights"):
        NoduleGenerator.from_pretrained(tmp_path)


@pytest.mark.usefixtures("small_files")
def test_an_index_cannot_reach_out_of_its_folder(tmp_path):
    _generator().save_pretrained(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] = {name: "../model.safetensors" for name in index["weight_map"]}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="files must be named without a folder"):
        NoduleGenerator.from_pretrained(tmp_path)


def test_rows_are_cut_and_joined_in_order():
    arrays = {"a": np.arange(60, dtype=np.float32).reshape(15, 4), "b": np.float32(1).reshape(())}
    pieces = shards._cut(arrays, 16)
    assert len(pieces) == 16 and all(piece.nbytes <= 16 for piece in pieces.values())
    joined = shards._joined(dict(sorted(pieces.items())))  # "a[10:11]" comes before "a[2:3]"
    assert joined["b"] == 1 and np.array_equal(joined["a"], arrays["a"])
