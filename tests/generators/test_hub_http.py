"""Weights and prior through the hub's HTTP interface: pushed by one process, had by others, also without a network.

The client is the real one; the hub is `hub_server`. It reads its address when it is imported, hence the processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer

from carim_aug.generators.checkpoint import FILE, PRIOR
from carim_aug.generators.shards import INDEX

ROOT = Path(__file__).resolve().parents[2]

BEGIN = """
import json
import torch
from carim_aug import LocationPrior, NoduleGenerator, SyntheticNoduleMix, WeightsError, shards
from carim_aug.generators.multiscale import GeneratorConfig

told = {}

def made(seed):
    torch.manual_seed(seed)
    return NoduleGenerator(GeneratorConfig(16, 16, 16, (16, 16), (1, 0), 2, joint=True))

def hash_of(*args, **options):
    try:
        return NoduleGenerator.from_pretrained(*args, **options).weights_hash
    except WeightsError as error:
        return str(error)

def mix_of(*args, **options):
    try:
        mix = SyntheticNoduleMix.from_pretrained(*args, **options)
        return [mix.weights_hash, mix.prior.n_boxes]
    except WeightsError as error:
        return str(error)
"""

PUSH = """
first, second, third = made(0), made(1), made(2)
first.provenance = {"training_data": "a phantom"}
told["hashes"] = [g.weights_hash for g in (first, second, third)]
told["boxes"] = LocationPrior.bundled().n_boxes
told["url"] = SyntheticNoduleMix(first, LocationPrior.bundled()).push_to_hub(
    "user/nodules", commit_message="the first", private=True
)
second.push_to_hub("user/nodules", prior=LocationPrior.bundled(), branch="v2", commit_message="the second")
third.push_to_hub("user/bare")
first.push_to_hub("user/split")
shards.LARGEST = 60_000
second.push_to_hub("user/split", commit_message="in parts")
shards.LARGEST = 16_000_000
second.push_to_hub("user/whole_again")
shards.LARGEST = 60_000
first.push_to_hub("user/whole_again")
shards.LARGEST = 16_000_000
third.push_to_hub("user/whole_again")
"""

LOAD = """
told["mix"] = mix_of("user/nodules")
told["v2"] = mix_of("user/nodules", revision="v2")
told["commit"] = hash_of("user/nodules", revision=COMMIT)
told["split"] = hash_of("user/split")
told["whole again"] = hash_of("user/whole_again")
told["bare"] = hash_of("user/bare")
told["bare mix"] = mix_of("user/bare")
told["bare mix, prior given"] = mix_of("user/bare", prior=LocationPrior.bundled())
told["local only"] = hash_of("user/nodules", local_files_only=True)
told["no revision"] = hash_of("user/nodules", revision="v3")
told["no repository"] = hash_of("user/nobody")
told["no token"] = hash_of("user/nodules", token=False, cache_dir=ELSEWHERE)
told["elsewhere"] = hash_of("user/nodules", cache_dir=ELSEWHERE)
"""


class Session:
    """Processes that share one hub and one cache."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hub = folder, HubServer()
        self.pushed = self.run(PUSH)
        self.commit = self.pushed["url"].rpartition("/")[2]

    def run(self, code: str, **environment: str) -> dict:
        known = {"COMMIT": getattr(self, "commit", ""), "ELSEWHERE": str(self.folder / "elsewhere")}
        names = "\n".join(f"{name} = {value!r}" for name, value in known.items())
        done = subprocess.run(
            [sys.executable, "-c", f"{BEGIN}\n{names}\n{code}\nprint(json.dumps(told))"],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
                "PYTHONPATH": str(ROOT),
                "HF_ENDPOINT": self.hub.address,
                "HF_HOME": str(self.folder / "home"),
                "HF_TOKEN": TOKEN,
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "NO_PROXY": "127.0.0.1,localhost",
                "no_proxy": "127.0.0.1,localhost",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    session = Session(tmp_path_factory.mktemp("hub"))
    yield session
    session.hub.shutdown()
    session.hub.server_close()


@pytest.fixture(scope="module")
def loaded(session):
    return session.run(LOAD)


def test_one_repository_holds_weights_prior_config_and_card(session):
    files = session.hub.files("user/nodules", "main")
    assert files.keys() == {".gitattributes", FILE, PRIOR, "config.json", "README.md"}
    card = files["README.md"].decode()
    assert session.pushed["hashes"][0] in card and "a phantom" in card and "library_name: carim_aug" in card
    assert session.hub.private == {"user/nodules": True} | dict.fromkeys(
        ("user/bare", "user/split", "user/whole_again"), False
    )
    assert session.hub.messages[session.commit] == "the first"
    assert session.pushed["url"] == f"{session.hub.address}/user/nodules/commit/{session.commit}"


def test_what_is_had_from_the_hub_is_what_was_pushed(session, loaded):
    (first, second, third), boxes = session.pushed["hashes"], session.pushed["boxes"]
    assert loaded["mix"] == [first, boxes] and loaded["bare"] == third
    assert loaded["v2"] == [second, boxes] and loaded["commit"] == loaded["local only"] == loaded["elsewhere"] == first


def test_a_push_to_a_branch_makes_it_and_leaves_main_alone(session):
    assert session.hub.branches["user/nodules"].keys() == {"main", "v2"}
    assert session.hub.branches["user/nodules"]["main"] == session.commit
    assert session.hub.messages[session.hub.branches["user/nodules"]["v2"]] == "the second"


def test_weights_of_one_form_replace_those_of_the_other(session, loaded):
    names = session.hub.files("user/split", "main").keys()
    assert INDEX in names and FILE not in names and sum("-of-" in name for name in names) > 1
    assert loaded["split"] == session.pushed["hashes"][1]
    # The prior that came with weights of another push stays.
    again = session.hub.files("user/whole_again", "main")
    assert again.keys() == {".gitattributes", FILE, PRIOR, "config.json", "README.md"}
    assert loaded["whole again"] == session.pushed["hashes"][2]


def test_what_is_missing_on_the_hub_is_named(session, loaded):
    assert "user/bare has no prior.safetensors" in loaded["bare mix"]
    assert "pass prior=LocationPrior.bundled()" in loaded["bare mix"]
    assert loaded["bare mix, prior given"] == [session.pushed["hashes"][2], session.pushed["boxes"]]
    for case, words in (("no revision", "at revision 'v3'"), ("no repository", "user/nobody"), ("no token", "401")):
        assert words in loaded[case] and "model.safetensors" in loaded[case]


CACHED = """
told["mix"] = mix_of("user/nodules")
told["v2"] = mix_of("user/nodules", revision="v2")
"""

OFFLINE = """
told["split"] = hash_of("user/split")
told["bare"] = hash_of("user/bare")
told["bare mix"] = mix_of("user/bare")
told["not cached"] = hash_of("user/nodules", revision="v3")
"""


def test_offline_the_cache_serves_and_what_is_not_in_it_is_named(session, loaded):
    before = len(session.hub.requests)
    told = session.run(CACHED + OFFLINE, HF_HUB_OFFLINE="1")
    assert len(session.hub.requests) == before
    for case in ("mix", "v2", "split", "bare"):
        assert told[case] == loaded[case]
    for case in ("bare mix", "not cached"):
        assert "is not in the local cache" in told[case] and "go online once, or give a folder" in told[case]


def test_a_hub_that_is_down_is_no_hindrance_to_what_is_cached(session, loaded):
    told = session.run(CACHED, HF_ENDPOINT="http://127.0.0.1:9")
    assert told == {case: loaded[case] for case in ("mix", "v2")}
