"""Weights in and out: sealed safetensors, folders and the hub; everything that can be wrong with them is said."""

import copy
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch.nn.utils import parametrize

from carim_aug import LocationPrior, SyntheticNoduleMix, checkpoint, hub
from carim_aug.generators.checkpoint import FILE, FORMAT, PRIOR, fetch
from carim_aug.generators.multiscale import ARCHITECTURES, GeneratorConfig, MultiScaleGenerator
from carim_aug.generators.pretrained import NoduleGenerator, WeightsError
from carim_aug.ops.sealed import digest, read_sealed, write_sealed

SMALL = GeneratorConfig(16, 4, 4, (3, 3), (1, 0), 2, joint=True)
ABOUT = {"training_data": "a phantom", "recipe": {"images": 1000, "lr": [1e-4, 2e-4]}, "git_commit": "0123abc"}


def made(config: GeneratorConfig = SMALL, seed: int = 0) -> NoduleGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = NoduleGenerator(config)
        with torch.no_grad():
            generator(torch.randn(4, config.noise_dim), torch.zeros(4, 1, config.image_size, config.image_size))
    return generator


def inputs(config: GeneratorConfig = SMALL) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(1)
    size = config.image_size
    masks = (torch.rand(2, 1, size, size, generator=stream) < 0.3).float()
    return torch.randn(2, config.noise_dim, generator=stream), masks


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, others = a.state_dict(), b.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good weights; not to be written in."""
    folder = tmp_path_factory.mktemp("weights") / "good"
    made().save_pretrained(folder, **ABOUT)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the good weights, to be spoilt."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewrite(folder: Path, change) -> None:
    """Changes arrays and texts of a file, and seals it anew: what a wrong program, not a damaged disk, would leave."""
    arrays, texts, sealed = read_sealed(folder / FILE)
    assert sealed
    change(arrays, texts)
    write_sealed(folder / FILE, arrays, {**texts, "tensors_sha256": digest(arrays, {})})


# Making


def test_a_config_may_be_a_name_a_dict_or_itself():
    tiny = ARCHITECTURES["tiny"]
    assert [NoduleGenerator(c).config for c in ("tiny", tiny.to_dict(), tiny)] == [tiny] * 3
    assert isinstance(NoduleGenerator(SMALL), MultiScaleGenerator)


def test_untrained_weights_have_a_hash_and_no_provenance():
    generator = made()
    assert generator.provenance == {}
    assert len(generator.weights_hash) == 64


@pytest.mark.parametrize(
    ("config", "error", "rule"),
    [
        ("huge512", ValueError, r"config must be one of \[.*'tiny'\], got 'huge512'"),
        ({"image_size": 256, "depth": 3}, ValueError, "config must hold GeneratorConfig's fields, got .*depth"),
        ({"image_size": 100}, ValueError, "image_size must be"),
        (256, TypeError, "config must be a GeneratorConfig, a dict or a name, got int"),
    ],
)
def test_configs_that_are_none_are_refused(config, error, rule):
    with pytest.raises(error, match=rule):
        NoduleGenerator(config)


# Saved and loaded


def test_what_is_loaded_is_what_was_saved(saved):
    generator, loaded = made(), NoduleGenerator.from_pretrained(saved)
    assert same(generator, loaded)
    assert loaded.config == SMALL and loaded.weights_hash == generator.weights_hash
    assert {k: loaded.provenance[k] for k in ABOUT} == ABOUT
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs()), generator.eval()(*inputs()), rtol=0, atol=0)
    # It can be trained further.
    loaded.train()(*inputs()).mean().backward()
    assert all(p.grad is not None for p in loaded.stem.parameters())


def test_a_folder_holds_safetensors_a_config_and_a_card_and_no_pickle(saved):
    assert {file.name for file in saved.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert GeneratorConfig(**json.loads((saved / "config.json").read_text())) == SMALL
    card = (saved / "README.md").read_text()
    assert "a phantom" in card and made().weights_hash in card and "not a medical device" in card.lower()


def test_the_file_says_of_itself_what_it_is(saved):
    _, texts, sealed = read_sealed(saved / FILE)
    assert sealed
    assert (texts["format"], texts["format_version"]) == ("carim_aug.generator", "1")
    assert json.loads(texts["architecture"]) == SMALL.to_dict()
    assert json.loads(texts["value_range"]) == [-1.0, 1.0]
    about = json.loads(texts["provenance"])
    assert {k: about[k] for k in ABOUT} == ABOUT and about["carim_aug"]
    assert texts["tensors_sha256"] == made().weights_hash


def test_provenance_outlives_a_second_save(saved, tmp_path):
    loaded = NoduleGenerator.from_pretrained(saved)
    loaded.save_pretrained(tmp_path, git_commit="4567def")
    again = NoduleGenerator.from_pretrained(tmp_path)
    assert again.provenance["training_data"] == "a phantom" and again.provenance["git_commit"] == "4567def"


def test_entries_of_the_cards_head_are_the_callers(tmp_path):
    made().save_pretrained(tmp_path, model_card_kwargs={"datasets": ["phantoms"], "license": "cc0-1.0"})
    head = huggingface_hub.ModelCard.load(tmp_path / "README.md").data.to_dict()
    given = {"datasets": ["phantoms"], "license": "cc0-1.0", "library_name": "carim_aug"}
    assert {name: head[name] for name in given} == given


def test_loading_neither_reads_nor_moves_the_global_random_state(saved):
    state = torch.get_rng_state()
    NoduleGenerator.from_pretrained(saved)
    copy.deepcopy(made())
    assert torch.equal(torch.get_rng_state(), state)


def test_loaded_weights_do_not_hang_on_the_file(folder):
    loaded = NoduleGenerator.from_pretrained(folder)
    before = loaded(*inputs())
    (folder / FILE).write_bytes(bytes((folder / FILE).stat().st_size))
    torch.testing.assert_close(loaded(*inputs()), before, rtol=0, atol=0)


def test_saving_weights_that_are_not_finite_is_refused_and_leaves_the_file(folder):
    generator, before = made(), (folder / FILE).read_bytes()
    with torch.no_grad():
        generator.stem.norm.bias[3] = torch.inf
    with pytest.raises(WeightsError, match=r"'stem.norm.bias' must be finite"):
        generator.save_pretrained(folder)
    assert (folder / FILE).read_bytes() == before
    assert {file.name for file in folder.iterdir()} <= {FILE, "config.json", "README.md"}


def test_saving_weights_that_are_not_float32_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"weights must be float32 to be saved, got \['torch.bfloat16'\]"):
        made().bfloat16().save_pretrained(tmp_path)


def test_a_recipe_that_is_no_json_is_refused_before_anything_is_kept(tmp_path):
    generator = made()
    with pytest.raises(TypeError):
        generator.save_pretrained(tmp_path, recipe={"generator": generator})
    assert generator.provenance == {} and list(tmp_path.iterdir()) == []


# Hash


def test_the_hash_follows_every_change_of_a_tensor():
    generator = made()
    seen = {generator.weights_hash}
    with torch.no_grad():
        generator.stem.norm.bias[0] += 1
    seen.add(generator.weights_hash)
    generator.stem.norm.running_mean[0] += 1
    seen.add(generator.weights_hash)
    generator.load_state_dict(made(seed=5).state_dict())
    seen.add(generator.weights_hash)
    assert len(seen) == 4
    assert generator.weights_hash == made(seed=5).weights_hash
    assert made().weights_hash == made().eval().weights_hash  # the mode is no weight


def test_the_hash_is_worked_out_once(monkeypatch):
    generator = made()
    value = generator.weights_hash
    monkeypatch.setattr(hub, "digest", None)
    assert generator.weights_hash == value


# Damage


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_noticed(saved, data):
    content = bytearray((saved / FILE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    in_header = data.draw(st.booleans())
    place = data.draw(st.integers(0, header - 1) if in_header else st.integers(header, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(content)
        with pytest.raises(WeightsError, match=FILE):
            NoduleGenerator.from_pretrained(folder)


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_noticed(saved, share):
    content = (saved / FILE).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(content[: int(share * len(content))])
        with pytest.raises(WeightsError, match="truncated or damaged"):
            NoduleGenerator.from_pretrained(folder)


def test_bytes_after_the_end_are_noticed(folder):
    with (folder / FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(WeightsError, match="truncated or damaged"):
        NoduleGenerator.from_pretrained(folder)


def test_a_changed_text_is_noticed(folder):
    arrays, texts, _ = read_sealed(folder / FILE)
    seal = digest(arrays, texts)
    texts["provenance"] = texts["provenance"].replace("a phantom", "patients!")
    save_file(arrays, folder / FILE, {**texts, "sha256": seal})
    with pytest.raises(WeightsError, match="does not match its own SHA-256"):
        NoduleGenerator.from_pretrained(folder)


# Sound files that are not right


def renamed(arrays, texts):
    arrays["stem.norm.gain"] = arrays.pop("stem.norm.weight")


def reshaped(arrays, texts):
    arrays["stem.norm.weight"] = arrays["stem.norm.weight"].reshape(2, -1)


def halved(arrays, texts):
    arrays["stem.norm.weight"] = arrays["stem.norm.weight"].astype(np.float16)


def with_one_more(arrays, texts):
    arrays["extra"] = np.zeros(3, np.float32)


def with_nan(arrays, texts):
    arrays["ups.1.norm.running_var"][1] = np.nan


def with_infinity(arrays, texts):
    arrays["ups.1.norm.bias"][0] = -np.inf


def smaller(arrays, texts):
    texts["architecture"] = json.dumps({**SMALL.to_dict(), "stem_channels": 3})


def of_impossible_architecture(arrays, texts):
    texts["architecture"] = json.dumps({**SMALL.to_dict(), "image_size": 17})


def of_unknown_architecture(arrays, texts):
    texts["architecture"] = json.dumps({**SMALL.to_dict(), "depth": 3})


def without_architecture(arrays, texts):
    del texts["architecture"]


def of_another_range(arrays, texts):
    texts["value_range"] = "[0.0, 1.0]"


def with_odd_provenance(arrays, texts):
    texts["provenance"] = "[]"


def without_provenance(arrays, texts):
    del texts["provenance"]


def newer(arrays, texts):
    texts["format_version"] = "2"


def of_odd_version(arrays, texts):
    texts["format_version"] = "latest"


def of_a_prior(arrays, texts):
    texts["format"] = "carim_aug.prior"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (renamed, r"lacks 1 tensors, the first 'stem.norm.weight'"),
        (with_one_more, r"has 1 unexpected tensors, the first 'extra'"),
        (reshaped, r"'stem.norm.weight' must be float32 of shape \(128,\), got float32 of \(2, 64\)"),
        (halved, r"'stem.norm.weight' must be float32 of shape \(128,\), got float16"),
        (smaller, r"must be float32 of shape"),
        (with_nan, r"'ups.1.norm.running_var' must be finite, got NaN or infinity"),
        (with_infinity, r"'ups.1.norm.bias' must be finite, got NaN or infinity"),
        (of_impossible_architecture, "image_size must be"),
        (of_unknown_architecture, "depth"),
        (without_architecture, "architecture"),
        (of_another_range, r"must have the value range \(-1.0, 1.0\), got \(0.0, 1.0\)"),
        (with_odd_provenance, r"must have a JSON object as its provenance, got \[\]"),
        (without_provenance, "provenance"),
        (newer, r"is of format version '2', newer than 1: upgrade carim-aug"),
        (of_odd_version, r"is of format version 'latest'"),
        (of_a_prior, rf"must be of format '{FORMAT}', got 'carim_aug.prior'"),
    ],
)
def test_a_sound_file_that_is_not_right_is_named(folder, change, rule):
    rewrite(folder, change)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=rule) as caught:
        NoduleGenerator.from_pretrained(folder)
    assert str(folder / FILE) in str(caught.value)


def test_a_safetensors_file_of_somebody_else_is_named(folder):
    save_file({"weight": np.zeros(3, np.float32)}, folder / FILE)
    with pytest.raises(WeightsError, match=f"must be of format '{FORMAT}', got None"):
        NoduleGenerator.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", json.dumps({**SMALL.to_dict(), "noise_dim": 5})])
def test_a_config_file_that_does_not_fit_the_weights_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"config.json (is no JSON|describes another architecture)"):
        NoduleGenerator.from_pretrained(folder)


# Pickles


class Trap:
    def __reduce__(self):
        return os.abort, ()  # unpickling this would end the test run


def pickled(protocol: int) -> bytes:
    return pickle.dumps({"state": Trap()}, protocol=protocol)


def zipped() -> bytes:
    buffer = io.BytesIO()
    torch.save(Trap(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("content", [pickled(2), pickled(4), pickled(5), zipped()], ids=["p2", "p4", "p5", "zip"])
def test_a_pickle_under_the_name_of_the_weights_is_refused_unopened(folder, content):
    (folder / FILE).write_bytes(content)
    with pytest.raises(WeightsError, match="is a pickle under a wrong name, which is never loaded"):
        NoduleGenerator.from_pretrained(folder)


def test_an_old_pickle_under_the_name_of_the_weights_is_refused_unopened(folder):
    (folder / FILE).write_bytes(pickled(0))
    with pytest.raises(WeightsError, match="truncated or damaged"):
        NoduleGenerator.from_pretrained(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "last.ckpt"])
def test_a_folder_with_a_pickle_alone_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(pickled(4))
    with pytest.raises(WeightsError, match=rf"holds {name}, a pickle, which is never loaded here"):
        NoduleGenerator.from_pretrained(tmp_path)


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path):
    generator = made()
    first = set()
    for more in range(0, 256, 8):
        generator.save_pretrained(tmp_path, training_data="x" * more)
        first.add((tmp_path / FILE).read_bytes()[0])
        NoduleGenerator.from_pretrained(tmp_path)
    assert 0x80 in first


# Folders and the hub


def test_no_such_folder_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no folder .*nowhere: give an existing folder or a hub id"):
        NoduleGenerator.from_pretrained(tmp_path / "nowhere")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(WeightsError, match=rf"{tmp_path} has no model.safetensors"):
        NoduleGenerator.from_pretrained(tmp_path)


def test_a_file_in_place_of_a_folder_is_named(saved):
    with pytest.raises(WeightsError, match=r"is a file: give the folder that holds model.safetensors"):
        NoduleGenerator.from_pretrained(saved / FILE)


def test_without_a_name_the_bundled_weights_are_meant(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "BUNDLED", saved)
    assert same(NoduleGenerator.from_pretrained(), made())
    assert fetch(None, FILE) == saved / FILE


def test_a_local_folder_needs_no_network(saved, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a local folder asked the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(checkpoint, "hf_hub_download", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert same(NoduleGenerator.from_pretrained(saved), made())


def test_a_hub_id_is_fetched_with_all_that_was_asked(saved, monkeypatch, tmp_path):
    calls = []

    def stand_in(repo_id, filename, **options):
        calls.append((repo_id, filename, options))
        if not (saved / filename).is_file():
            raise Missing(f"404: {filename}")
        return str(saved / filename)

    monkeypatch.setattr(checkpoint, "hf_hub_download", stand_in)
    options = {"revision": "v2", "local_files_only": True, "cache_dir": tmp_path, "token": "secret"}
    assert same(NoduleGenerator.from_pretrained("user/nodules", **options), made())
    assert calls[0] == ("user/nodules", FILE, {**options, "force_download": False})
    assert calls[1] == ("user/nodules", PRIOR, calls[0][2]) and len(calls) == 2
    fetch("user/nodules", "config.json", force_download=True)
    assert calls[-1][:2] == ("user/nodules", "config.json") and calls[-1][2]["force_download"]


def test_the_hubs_cache_is_read_without_a_network(saved, tmp_path):
    # The layout of the hub's cache, as its client writes it.
    repository, commit = tmp_path / "models--user--nodules", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / FILE).write_bytes((saved / FILE).read_bytes())
    where = {"cache_dir": tmp_path, "local_files_only": True}
    assert same(NoduleGenerator.from_pretrained("user/nodules", **where), made())
    assert same(NoduleGenerator.from_pretrained("user/nodules", revision=commit, **where), made())
    with pytest.raises(WeightsError, match="not in the local cache"):
        NoduleGenerator.from_pretrained("user/nodules", revision="v2", **where)


def test_an_empty_cache_without_a_network_says_what_to_do(tmp_path):
    with pytest.raises(
        WeightsError, match=r"user/nodules: model.safetensors is not in the local cache .*go online once"
    ):
        NoduleGenerator.from_pretrained("user/nodules", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("name", ["user name/nodules", "user/nodules..", "a--b"])
def test_a_name_that_can_be_no_hub_id_is_named(name, tmp_path):
    with pytest.raises(WeightsError, match="is neither a folder nor a hub id"):
        NoduleGenerator.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("failure", [OSError("disk full"), RuntimeError("connection reset"), ValueError("odd answer")])
def test_any_failure_of_the_hub_is_a_weights_error(failure, monkeypatch):
    def stand_in(*args, **options):
        raise failure

    monkeypatch.setattr(checkpoint, "hf_hub_download", stand_in)
    with pytest.raises(WeightsError, match=rf"cannot be had from the hub at revision 'v2': {failure}") as caught:
        NoduleGenerator.from_pretrained("user/nodules", revision="v2")
    assert caught.value.__cause__ is failure


def test_pushing_uploads_weights_config_and_card_and_nothing_else(monkeypatch):
    uploads, branches = [], []

    class Api:
        def __init__(self, token=None, **options):
            self.token = token

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id, *, branch, exist_ok):
            branches.append((self.token, repo_id, branch, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, **options):
            files = {
                str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()
            }
            uploads.append((self.token, repo_id, files, options))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr(hub, "HfApi", Api)
    generator = made()
    assert generator.push_to_hub("user/nodules", token="secret", branch="v2", private=True) == "https://hub/commit"
    token, repo_id, files, options = uploads[0]
    assert (token, repo_id, options["revision"]) == ("secret", "user/nodules", "v2")
    assert branches == [("secret", "user/nodules", "v2", True)]
    assert files.keys() == {"model.safetensors", "config.json", "README.md"}
    assert not any(content.startswith((b"PK", b"\x80\x02", b"\x80\x04")) for content in files.values())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(files[FILE])
        assert same(NoduleGenerator.from_pretrained(folder), generator)


# Copies and pickles


COPIES = pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g)), lambda g: torch_saved(g)],
    ids=["copy", "pickle", "torch"],
)


def torch_saved(generator: NoduleGenerator) -> NoduleGenerator:
    buffer = io.BytesIO()
    torch.save(generator, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@COPIES
@pytest.mark.parametrize("training", [True, False])
def test_copies_are_equal_and_keep_modes_and_what_is_frozen(again, training):
    generator = made().train(training)
    generator.provenance = {"training_data": "a phantom"}
    generator.stem.eval()
    generator.heads.requires_grad_(False)
    other = again(generator)
    assert type(other) is NoduleGenerator and same(other, generator)
    assert other.config == generator.config and other.provenance == generator.provenance
    assert other.weights_hash == generator.weights_hash
    assert [m.training for m in other.modules()] == [m.training for m in generator.modules()]
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in generator.parameters()]


@COPIES
def test_a_copy_shares_nothing_with_the_original(again):
    generator = made()
    before, hashed = generator.eval()(*inputs()).detach(), generator.weights_hash
    other = again(generator)
    for module in other.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    assert generator.weights_hash == hashed
    torch.testing.assert_close(generator(*inputs()).detach(), before, rtol=0, atol=0)
    generator.train()(*inputs()).mean().backward()
    assert all(p.grad is not None for p in generator.stem.parameters())


def test_importing_takes_nothing_heavy_along():
    code = (
        "import sys, carim_aug.generators.multiscale, torch, numpy, huggingface_hub\n"
        "before = set(sys.modules)\n"
        "import carim_aug.generators.pretrained\n"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(hub.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert not {"scipy", "sklearn", "matplotlib", "lightning", "transformers", "pandas"} & set(done.stdout.split())


# A prior beside the weights


class Hub:
    """Stands in for the hub: what is pushed to it can be had from it, and what is missing is a 404."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda token=None: self)
        monkeypatch.setattr(checkpoint, "hf_hub_download", self.download)

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit"

    def download(self, repo_id, filename, **options):
        if not (self.root / repo_id / filename).is_file():
            raise Missing(f"404: {repo_id}/{filename}")
        return str(self.root / repo_id / filename)


class Missing(EntryNotFoundError):
    """A 404 without the HTTP answer that the client's own wants, of one library or another."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


@pytest.fixture
def stand_in(tmp_path_factory, monkeypatch) -> Hub:
    return Hub(tmp_path_factory.mktemp("hub"), monkeypatch)


def content(prior: LocationPrior | Path, folder: Path) -> str:
    """A digest of what a prior's file holds; its bytes differ from save to save, for its texts have no order."""
    path = prior
    if isinstance(prior, LocationPrior):
        path = folder / "alone.safetensors"
        prior.save(path)
    arrays, texts, sealed = read_sealed(path)
    assert sealed
    return digest(arrays, texts)


def test_a_pushed_mix_is_a_mix_again_for_whoever_loads_it(stand_in):
    mix = SyntheticNoduleMix(made(), LocationPrior.bundled(), p=1.0, seed=5)
    assert mix.push_to_hub("user/nodules", commit_message="first") == "https://hub/user/nodules/commit"
    again = SyntheticNoduleMix.from_pretrained("user/nodules", p=1.0, seed=5)
    batch = torch.zeros(3, 1, 32, 32), torch.zeros(3, dtype=torch.long)
    assert all(torch.equal(a, b) for a, b in zip(again(*batch), mix(*batch), strict=True))
    assert again.last_params == mix.last_params
    assert {file.name for file in (stand_in.root / "user/nodules").iterdir()} == {
        FILE,
        PRIOR,
        "config.json",
        "README.md",
    }


def test_a_saved_mix_is_a_mix_again(tmp_path):
    mix = SyntheticNoduleMix(made(), LocationPrior.bundled(), p=1.0)
    assert mix.save_pretrained(tmp_path / "new", training_data="drawn") is None
    again = SyntheticNoduleMix.from_pretrained(tmp_path / "new")
    assert again.weights_hash == mix.weights_hash and again.generator.provenance["training_data"] == "drawn"
    assert content(again.prior, tmp_path) == content(mix.prior, tmp_path)


def test_a_generator_is_pushed_with_the_prior_it_is_given(stand_in, tmp_path):
    generator = made()
    generator.push_to_hub("user/nodules", prior=LocationPrior.bundled())
    pushed = stand_in.root / "user/nodules" / PRIOR
    assert content(pushed, tmp_path) == content(LocationPrior.bundled(), tmp_path)
    assert SyntheticNoduleMix.from_pretrained("user/nodules").weights_hash == generator.weights_hash
    assert "prior=..." not in (stand_in.root / "user/nodules/README.md").read_text()


@pytest.mark.parametrize("way", ["folder", "hub", "copy", "pickle"])
def test_a_prior_beside_loaded_weights_goes_where_they_go(way, stand_in, tmp_path):
    first = tmp_path / "first"
    made().save_pretrained(first, prior=LocationPrior.bundled())
    generator = NoduleGenerator.from_pretrained(first)
    if way == "hub":
        generator.push_to_hub("user/first")
        generator = NoduleGenerator.from_pretrained("user/first")
    elif way == "copy":
        generator = copy.deepcopy(generator)
    elif way == "pickle":
        generator = pickle.loads(pickle.dumps(generator))
    generator.save_pretrained(tmp_path / "second")
    generator.push_to_hub("user/second")
    expected = (first / PRIOR).read_bytes()
    assert (tmp_path / "second" / PRIOR).read_bytes() == expected
    assert (stand_in.root / "user/second" / PRIOR).read_bytes() == expected


def test_weights_without_a_prior_load_alone_and_a_mix_says_what_it_lacks(stand_in, saved):
    made().push_to_hub("user/bare")
    assert "prior=..." in (stand_in.root / "user/bare/README.md").read_text()
    for name in ("user/bare", saved):
        assert same(NoduleGenerator.from_pretrained(name), made())
        with pytest.raises(WeightsError, match=r"has no prior.safetensors.*: pass prior=LocationPrior.bundled\(\)"):
            SyntheticNoduleMix.from_pretrained(name)
        mix = SyntheticNoduleMix.from_pretrained(name, prior=LocationPrior.bundled())
        assert mix.prior.n_boxes == LocationPrior.bundled().n_boxes


def test_a_checkpoint_beside_weights_is_not_taken_for_the_missing_prior(folder):
    (folder / "last.ckpt").write_bytes(b"")
    with pytest.raises(WeightsError, match="has no prior.safetensors: pass prior="):
        SyntheticNoduleMix.from_pretrained(folder)


def test_a_save_without_a_prior_leaves_the_one_that_is_there(tmp_path):
    made().save_pretrained(tmp_path, prior=LocationPrior.bundled())
    before = (tmp_path / PRIOR).read_bytes()
    made(seed=1).save_pretrained(tmp_path)
    assert (tmp_path / PRIOR).read_bytes() == before


def test_a_prior_that_is_none_is_named_before_anything_is_written(tmp_path, stand_in):
    for door in (
        lambda p: made().save_pretrained(tmp_path / "a", prior=p),
        lambda p: made().push_to_hub("a/b", prior=p),
    ):
        with pytest.raises(TypeError, match="prior must be a LocationPrior, got str"):
            door("prior.safetensors")
    assert not (tmp_path / "a").exists() and not (stand_in.root / "a").exists()


def test_a_hub_that_fails_at_the_prior_is_no_hub_without_one(stand_in, monkeypatch):
    made().push_to_hub("user/nodules", prior=LocationPrior.bundled())

    def fails(repo_id, filename, **options):
        if filename == PRIOR:
            raise RuntimeError("connection reset")
        return stand_in.download(repo_id, filename)

    monkeypatch.setattr(checkpoint, "hf_hub_download", fails)
    with pytest.raises(WeightsError, match="prior.safetensors cannot be had from the hub.*connection reset"):
        NoduleGenerator.from_pretrained("user/nodules")


# What the generator refuses


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, torch.nan, torch.inf])
def test_a_mask_that_is_not_binary_is_refused(value):
    noise, masks = inputs()
    masks[1, 0, 3, 2] = value
    with pytest.raises(ValueError, match=r"masks must be (0 or 1 everywhere|finite), got .* at \(1, 0, 3, 2\)"):
        made()(noise, masks)


def test_noise_that_is_not_finite_or_no_float_is_refused():
    noise, masks = inputs()
    with pytest.raises(ValueError, match="noise must be floating point, got torch.int64"):
        made()(noise.long(), masks)
    noise[0, 1] = torch.nan
    with pytest.raises(ValueError, match="noise must be finite, got nan"):
        made()(noise, masks)
