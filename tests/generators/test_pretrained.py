"""Weights in and out: sealed safetensors, folders and the hub; everything that can be wrong with them is named."""

import copy
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny import global_states_untouched

from carim_aug import LocationPrior, NoduleGenerator, SyntheticNoduleMix, WeightsError, WholeImageGenerator
from carim_aug.generators import weights
from carim_aug.generators.multiscale import GeneratorConfig
from carim_aug.generators.pretrained import REGISTRY
from carim_aug.generators.weights import CARD, CONFIG, FILE, INDEX, PRIOR, fetch
from carim_aug.ops.sealed import digest, read_sealed, write_sealed

SMALL = GeneratorConfig(16, 4, 4, (3, 3), (1, 0), 2, joint=True)
FACTS = {"training_data": "a {phantom}", "recipe": {"images": 1000, "lr": [1e-4, 2e-4]}, "git_commit": "0123abc"}
SECTIONS = ["Training data", "Recipe", "Figures", "Limits", "Licence", "Citation"]
OWN = "---\nlicense: cc-by-4.0\n---\n# Ours\n\n## Figures\nAUC 0.9\n"
MASKS = torch.zeros(2, 1, 16, 16)
COPIES = (copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g)), lambda g: g.configure(), lambda g: g)


def made(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WholeImageGenerator(SMALL)


def names(folder):
    return {file.name for file in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of good weights and a prior; not to be written in."""
    folder = tmp_path_factory.mktemp("weights") / "good"
    made().save_pretrained(folder, prior=LocationPrior.bundled(), **FACTS)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the good weights, to be spoilt."""
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


# --- Saved and loaded ---
def test_what_is_loaded_is_what_was_saved_and_the_folder_says_what_it_holds(folder):
    _, texts, sealed = read_sealed(folder / FILE)
    assert sealed and (texts["format"], texts["format_version"]) == ("carim_aug.generator", "1")
    assert json.loads(texts["architecture"]) == SMALL.to_dict() and json.loads(texts["value_range"]) == [-1.0, 1.0]
    assert json.loads(texts["provenance"]).items() >= FACTS.items() and json.loads(texts["provenance"])["carim_aug"]
    assert names(folder) == {FILE, CONFIG, CARD, PRIOR} and texts["tensors_sha256"] == made().weights_hash
    assert GeneratorConfig(**json.loads((folder / CONFIG).read_text())) == SMALL
    arrays = [read_sealed(path) for path in (folder / PRIOR, weights.BUNDLED / PRIOR)]
    assert digest(*arrays[0][:2]) == digest(*arrays[1][:2])

    with global_states_untouched():
        loaded = NoduleGenerator.from_pretrained(folder)
    (folder / FILE).write_bytes(bytes((folder / FILE).stat().st_size))  # what is loaded does not hang on the file
    assert type(loaded) is WholeImageGenerator and loaded.config == SMALL
    assert loaded.weights_hash == made().weights_hash and len(loaded.weights_hash) == 64
    assert loaded.provenance.items() >= FACTS.items() and made().provenance == {}
    assert torch.equal(loaded.images(MASKS, [1, 2]), made().images(MASKS, [1, 2]))
    assert not loaded.network.training and not any(p.requires_grad for p in loaded.network.parameters())
    loaded.network.requires_grad_(True).train()(torch.zeros(2, 4), MASKS).mean().backward()  # it can be trained further
    assert all(p.grad is not None for p in loaded.network.stem.parameters())


def test_the_hash_follows_every_change_of_a_tensor():
    generator = made()
    seen = {generator.weights_hash, made(seed=5).weights_hash}
    for tensor in (generator.network.stem.norm.bias, generator.network.stem.norm.running_mean):
        tensor.data[0] += 1
        seen.add(generator.weights_hash)
    assert len(seen) == 4 and made(seed=5).weights_hash in seen


def test_provenance_and_prior_outlive_a_second_save(saved, tmp_path):
    for again in COPIES:
        again(NoduleGenerator.from_pretrained(saved)).save_pretrained(tmp_path, git_commit="4567def")
        facts = NoduleGenerator.from_pretrained(tmp_path).provenance
        assert facts["training_data"] == FACTS["training_data"] and facts["git_commit"] == "4567def"
        assert (tmp_path / PRIOR).read_bytes() == (saved / PRIOR).read_bytes()
    made(seed=1).save_pretrained(tmp_path)  # a save without a prior leaves the one that is there
    assert (tmp_path / PRIOR).read_bytes() == (saved / PRIOR).read_bytes()


@pytest.mark.parametrize("name", [None, "folder", "hub"])
def test_weights_without_a_prior_load_alone_and_a_mix_says_what_it_lacks(name, folder, monkeypatch):
    (folder / PRIOR).unlink()
    (folder / "last.ckpt").write_bytes(b"")  # not taken for the missing prior
    monkeypatch.setattr(weights, "BUNDLED", folder)
    monkeypatch.setattr(weights, "hf_hub_download", stand_in(folder))
    where = {None: None, "folder": folder, "hub": "user/nodules"}[name]
    assert NoduleGenerator.from_pretrained(where).weights_hash == made().weights_hash
    with pytest.raises(WeightsError, match=r"has no prior.safetensors.*: pass prior=LocationPrior.bundled\(\)"):
        SyntheticNoduleMix.from_pretrained(where)
    assert SyntheticNoduleMix.from_pretrained(where, prior=LocationPrior.bundled()).prior.max_count > 0


# --- The registry ---
class Flat(NoduleGenerator):
    """Adds a constant where the mask is."""

    format = "tests.flat"
    image_size = 8
    architecture = property(lambda self: {"width": self.network.out_features})

    @staticmethod
    def build(architecture):
        return torch.nn.Linear(2, architecture["width"])

    def residuals(self, regions, masks, seeds):
        return masks * self.network.weight[0, 0]


def test_a_new_kind_of_generator_is_a_class_with_a_format(tmp_path):
    one = Flat(torch.nn.Linear(2, 3))
    one.save_pretrained(tmp_path, training_data="none")
    again = NoduleGenerator.from_pretrained(tmp_path)
    assert again.weights_hash == one.weights_hash and REGISTRY["tests.flat"] is Flat
    assert type(again) is type(Flat.from_pretrained(tmp_path)) is type(copy.deepcopy(again)) is Flat
    card = ModelCard.load(tmp_path / CARD)
    assert '{"width": 3}' in card.text and card.data.library_name == "carim_aug" and card.data.license == "mit"
    batch = torch.zeros(2, 1, 32, 32), torch.zeros(2, dtype=torch.long)
    SyntheticNoduleMix(again, LocationPrior.bundled(), p=1.0)(*batch)
    with pytest.raises(WeightsError, match=r"format among \['carim_aug.generator'\], got 'tests.flat'"):
        WholeImageGenerator.from_pretrained(tmp_path)
    rewrite(tmp_path, {"architecture": "{}"})
    with pytest.raises(WeightsError, match="does not say what it holds .*'width'"):
        Flat.from_pretrained(tmp_path)
    for kind in (NoduleGenerator, type("None_", (NoduleGenerator,), {})):
        with pytest.raises(TypeError, match="generator must be of a class with a format, got .*WholeImageGenerator"):
            kind(torch.nn.ReLU())


# --- What is not saved ---
def test_weights_that_are_not_finite_or_not_float32_are_not_saved(folder):
    generator, before = made(), (folder / FILE).read_bytes()
    generator.network.stem.norm.bias.data[3] = torch.inf
    with pytest.raises(WeightsError, match="'stem.norm.bias' must be finite"):
        generator.save_pretrained(folder)
    generator.network.bfloat16()
    with pytest.raises(WeightsError, match=r"weights must be float32 to be saved, got \['torch.bfloat16'\]"):
        generator.save_pretrained(folder)
    assert (folder / FILE).read_bytes() == before and names(folder) <= {FILE, CONFIG, CARD, PRIOR}


@pytest.mark.parametrize("wrong", ["prior.safetensors", LocationPrior, torch.nn.ReLU()])
def test_a_prior_or_recipe_that_is_none_is_named_before_anything_is_written(wrong, tmp_path):
    generator = made()
    for door in (generator.save_pretrained, generator.push_to_hub):
        with pytest.raises(TypeError, match="prior must be a LocationPrior, got (str|type|.*Meta|ReLU)"):
            door(str(tmp_path / "new"), prior=wrong)
    with pytest.raises(TypeError):
        generator.save_pretrained(tmp_path / "new", recipe={"generator": generator})
    assert generator.provenance == {} and names(tmp_path) == set()


# --- Damage ---
def load(content, saved):
    folder = saved.with_name("spoilt")
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(content)
    NoduleGenerator.from_pretrained(folder)


@given(share=st.floats(0, 1, exclude_max=True), in_header=st.booleans(), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_and_another_length_are_noticed(saved, share, in_header, bit):
    content = (saved / FILE).read_bytes()
    flipped, place = bytearray(content), int(share * len(content))
    flipped[place % (8 + int.from_bytes(content[:8], "little")) if in_header else place] ^= 1 << bit
    for wrong, rule in ((flipped, FILE), (content[:place], "truncated or"), (content + b"\0", "truncated or damaged")):
        with pytest.raises(WeightsError, match=rule):
            load(wrong, saved)


def test_a_changed_text_and_a_file_of_somebody_else_are_noticed(folder):
    arrays, texts, _ = read_sealed(folder / FILE)
    changed = {**texts, "provenance": texts["provenance"].replace("phantom", "patient")}
    save_file(arrays, folder / FILE, {**changed, "sha256": digest(arrays, texts)})
    with pytest.raises(WeightsError, match="does not match its own SHA-256"):
        NoduleGenerator.from_pretrained(folder)
    save_file({"weight": np.zeros(3, np.float32)}, folder / FILE)
    with pytest.raises(WeightsError, match=r"must be of a format among .*'carim_aug.generator'.*, got None"):
        NoduleGenerator.from_pretrained(folder)


class Trap:
    def __reduce__(self):
        return os.abort, ()  # unpickling this would end the test run


@pytest.mark.parametrize("protocol", [0, 2, 4, 5, None])
def test_a_pickle_is_refused_unopened(protocol, saved):
    buffer = io.BytesIO()
    torch.save(Trap(), buffer) if protocol is None else pickle.dump({"state": Trap()}, buffer, protocol)
    rule = "truncated or damaged" if protocol == 0 else "is a pickle under a wrong name, which is never loaded"
    with pytest.raises(WeightsError, match=rule):
        load(buffer.getvalue(), saved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "last.ckpt"])
def test_a_folder_with_a_pickle_alone_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(WeightsError, match=rf"holds {name}, a pickle, which is never loaded"):
        NoduleGenerator.from_pretrained(tmp_path)


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(folder):
    for more in range(0, 256, 8):
        rewrite(folder, {"more": "x" * more})
        if (folder / FILE).read_bytes()[0] == 0x80:
            break
    assert NoduleGenerator.from_pretrained(folder).weights_hash == made().weights_hash and more < 248


# --- Sound files that are not right ---
def rewrite(folder, changes):
    """Change arrays and texts (None removes, a function changes), and seal anew: what a wrong program would leave."""
    arrays, texts, _ = read_sealed(folder / FILE)
    items = arrays | texts
    items |= {name: value(items) if callable(value) else value for name, value in changes.items()}
    arrays = {name: value for name, value in items.items() if isinstance(value, np.ndarray)}
    texts = {name: value for name, value in items.items() if isinstance(value, str)}
    write_sealed(folder / FILE, arrays, texts | {"tensors_sha256": digest(arrays, {})})


def numbers(**changed):
    return {"architecture": json.dumps({**SMALL.to_dict(), **changed})}


WEIGHT, HIGH, VARIANCE = "stem.norm.weight", "ups.1.norm.bias", "ups.1.norm.running_var"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({WEIGHT: None}, r"lacks 1 tensors, the first 'stem.norm.weight'"),
        ({"extra": lambda file: file[HIGH]}, r"has 1 unexpected tensors, the first 'extra'"),
        ({WEIGHT: lambda f: f[WEIGHT].reshape(2, -1)}, r"must be float32 of shape \(128,\), got float32 of \(2, 64\)"),
        ({WEIGHT: lambda f: f[WEIGHT].astype(np.float16)}, r"'stem.norm.weight' must be float32 .* got float16"),
        ({VARIANCE: lambda file: file[VARIANCE] * np.nan}, "'ups.1.norm.running_var' must be finite, got NaN or"),
        ({HIGH: lambda file: file[HIGH] - np.inf}, r"'ups.1.norm.bias' must be finite, got NaN or infinity"),
        (numbers(stem_channels=3), "must be float32 of shape"),
        (numbers(image_size=17), "image_size must be"),
        (numbers(depth=3), "depth"),
        ({"architecture": None}, "does not say what it holds .*architecture"),
        ({"architecture": "[1]"}, "does not say what it holds"),
        ({"value_range": "[0.0, 1.0]"}, r"must have the value range \(-1, 1\), got \[0.0, 1.0\]"),
        ({"provenance": "[]"}, r"must have a JSON object as its provenance, got \[\]"),
        ({"provenance": None}, "does not say what it holds .*provenance"),
        ({"format_version": "2"}, r"is of format version '2', newer than 1: upgrade carim-aug"),
        ({"format_version": "latest"}, r"is of format version 'latest'"),
        ({"format": "carim_aug.prior"}, r"must be of a format among .*'carim_aug.generator'.*, got 'carim_aug.prior'"),
    ],
)
def test_a_sound_file_that_is_not_right_is_named(folder, changes, rule):
    rewrite(folder, changes)
    (folder / CONFIG).unlink()
    with pytest.raises(WeightsError, match=rule) as caught:
        NoduleGenerator.from_pretrained(folder)
    assert str(folder / FILE) in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", json.dumps({**SMALL.to_dict(), "noise_dim": 5}).encode()])
def test_a_config_file_that_does_not_fit_the_weights_is_named(folder, content):
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(WeightsError, match=r"config.json (is no JSON|describes another architecture)"):
        NoduleGenerator.from_pretrained(folder)


# --- Folders and the hub ---
def stand_in(folder, failure=None):
    """`hf_hub_download` of a hub that has a folder's files; `failure` is raised for those that it lacks."""

    def download(repo_id, filename, **where):
        if (folder / filename).is_file():
            return str(folder / filename)
        raise failure or EntryNotFoundError.__new__(EntryNotFoundError, "404")  # without the client's HTTP answer

    return Mock(side_effect=download)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("{}/nowhere", r"there is no folder .*nowhere: give an existing folder or a hub id"),
        ("{}/empty", "empty has no model.safetensors: give a folder"),
        ("{}/split", rf"split holds weights in several files, got {INDEX}: save them again as one {FILE}"),
        (f"{{}}/{FILE}", "is a file: give the folder that holds model.safetensors"),
        ("user/nodules", "user/nodules: model.safetensors is not in the local cache .*go online once"),
        ("user name/nodules", "is neither a folder nor a hub id"),
        ("user/nodules..", "is neither a folder nor a hub id"),
        ("a--b", "is neither a folder nor a hub id"),
    ],
)
def test_weights_that_are_not_there_are_named(name, rule, folder):
    for inner in ("empty", "split"):
        (folder / inner).mkdir()
    (folder / "split" / INDEX).write_text("{}")
    with pytest.raises(WeightsError, match=rule):
        NoduleGenerator.from_pretrained(name.format(folder), cache_dir=folder / "empty", local_files_only=True)
    with pytest.raises(TypeError, match="revison"):
        NoduleGenerator.from_pretrained(folder, revison="v2")


def test_a_local_folder_needs_no_network_and_without_a_name_the_bundled_weights_are_meant(saved, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a local folder asked the network")

    for owner, name in ((weights, "hf_hub_download"), (socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    assert NoduleGenerator.from_pretrained(saved).weights_hash == made().weights_hash
    monkeypatch.setattr(weights, "BUNDLED", saved)
    assert NoduleGenerator.from_pretrained().weights_hash == made().weights_hash and fetch(None, FILE) == saved / FILE


def test_a_hub_id_is_fetched_with_all_that_was_asked(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "hf_hub_download", hub := stand_in(saved))
    where = {"revision": "v2", "local_files_only": True, "cache_dir": tmp_path, "token": "secret"}
    assert NoduleGenerator.from_pretrained("user/nodules", **where).weights_hash == made().weights_hash
    assert hub.mock_calls == [call("user/nodules", name, **where, force_download=False) for name in (FILE, PRIOR)]


@pytest.mark.parametrize("failure", [OSError("disk full"), RuntimeError("connection reset"), ValueError("odd answer")])
@pytest.mark.parametrize("name", [FILE, PRIOR])
def test_any_failure_of_the_hub_is_a_weights_error(failure, name, folder, monkeypatch):
    (folder / name).unlink()
    monkeypatch.setattr(weights, "hf_hub_download", stand_in(folder, failure))
    rule = rf"{name} cannot be had from the hub at revision 'v2': {failure}"
    with pytest.raises(WeightsError, match=rule) as caught:
        NoduleGenerator.from_pretrained("user/nodules", revision="v2")
    assert caught.value.__cause__ is failure


@pytest.mark.train
def test_importing_takes_nothing_heavy_along():
    heavy = {"scipy", "sklearn", "matplotlib", "lightning", "transformers", "pandas", "tensorboard"}
    code = "import sys, carim_aug; print(*{name.split('.')[0] for name in sys.modules})"
    root = str(weights.BUNDLED.parents[1])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True)
    assert done.returncode == 0 and not heavy & set(done.stdout.decode().split())


# --- The card ---
def headings(card):
    """The sections of a card, whose head must be what the hub asks for, as far as that can be known without it."""
    data, again = card.data.to_dict(), ModelCard(str(card))
    assert data["library_name"] == "carim_aug" and "chest-x-ray" in data["tags"] and data["license"]
    assert again.data.to_dict() == data and again.text == card.text
    return [line.removeprefix("## ") for line in card.text.splitlines() if line.startswith("## ")]


def test_a_written_card_has_what_a_reader_looks_for(saved, tmp_path):
    card = ModelCard.load(saved / CARD)
    assert headings(card) == SECTIONS and "prior=..." not in card.text and "not a medical device" in card.text.lower()
    for words in (FACTS["training_data"], json.dumps(FACTS["recipe"]), "0123abc", made().weights_hash, "Yonsei"):
        assert words in card.text
    made().save_pretrained(tmp_path, model_card_kwargs={"datasets": ["phantoms"], "license": "cc0-1.0"})
    card = ModelCard.load(tmp_path / CARD)
    assert (card.data.datasets, card.data.license, card.data.library_name) == (["phantoms"], "cc0-1.0", "carim_aug")
    assert "None: untrained." in card.text and "prior=..." in card.text and "weights: cc0-1.0" in card.text


def test_a_card_goes_with_its_weights_word_for_word_and_with_no_others(folder, tmp_path):
    (folder / CARD).write_text(OWN)
    generator = NoduleGenerator.from_pretrained(folder)
    for again in COPIES:
        card = again(generator).generate_model_card(language="en")
        assert headings(card) == ["Figures"] and card.text == OWN.split("---\n")[2]
        assert (card.data.license, card.data.language) == ("cc-by-4.0", "en")
    generator.save_pretrained(tmp_path / "same", prior=None, **FACTS)
    assert "AUC 0.9" in (tmp_path / "same" / CARD).read_text()

    trained, elsewhere, placed = (NoduleGenerator.from_pretrained(folder) for _ in range(3))
    trained.network.stem.norm.bias.data[0] += 1
    elsewhere.provenance["training_data"] = "another phantom"
    other = SimpleNamespace(draw=None, save=lambda path: path.write_bytes(b"another prior"))
    placed.save_pretrained(tmp_path / "other", prior=other)
    generator.save_pretrained(tmp_path / "newer", git_commit="4567def")
    for one in (trained, elsewhere, placed, generator):
        assert headings(one.generate_model_card()) == SECTIONS
    assert "AUC" not in (tmp_path / "other" / CARD).read_text() + (tmp_path / "newer" / CARD).read_text()


def test_the_bundled_card_is_pushed_whole_with_a_head():
    card = NoduleGenerator.from_pretrained().generate_model_card()
    assert card.text == (weights.BUNDLED / CARD).read_text() and {"Training data", "Figures"} <= set(headings(card))
