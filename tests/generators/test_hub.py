"""Weights and prior through the hub's HTTP interface: pushed by one process, had by others, also without a network.

The client is the real one; the hub is `hub_server`. It reads its address when it is imported, hence the processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import TOKEN, HubServer

from carim_aug.generators.weights import CARD, CONFIG, FILE, PRIOR

pytestmark = pytest.mark.train

BEGIN = """
import json, torch
from carim_aug import LocationPrior, NoduleGenerator, SyntheticNoduleMix, WeightsError, WholeImageGenerator
from carim_aug.generators.multiscale import GeneratorConfig

def made(seed):
    torch.manual_seed(seed)
    return WholeImageGenerator(GeneratorConfig(16, 4, 4, (3, 3), (1, 0), 2))

def mix_of(*args, **options):
    try:
        mix = SyntheticNoduleMix.from_pretrained(*args, **options)
        return [mix.weights_hash, mix.prior.n_boxes]
    except WeightsError as error:
        return str(error)
"""

PUSH = """
first, second, third = made(0), made(1), made(2)
first.provenance, prior = {"training_data": "a phantom"}, LocationPrior.bundled()
found = {"made": [[g.weights_hash, prior.n_boxes] for g in (first, second, third)]}
mix = SyntheticNoduleMix(first, prior)
found["url"] = mix.push_to_hub("user/nodules", commit_message="the first", private=True)
second.push_to_hub("user/nodules", prior=prior, branch="v2", commit_message="the second")
third.push_to_hub("user/bare")
"""

LOAD = """
found |= {
    "commit": mix_of("user/nodules", revision=COMMIT, cache_dir=ELSEWHERE),
    "local only": mix_of("user/nodules", local_files_only=True),
    "bare, prior given": mix_of("user/bare", prior=LocationPrior.bundled()),
    "no repository": mix_of("user/nobody"),
    "no token": mix_of("user/nodules", token=False, cache_dir=ELSEWHERE + "2"),
}
NoduleGenerator.from_pretrained("user/nodules").push_to_hub("user/again")
"""
CACHED = """found = {"main": mix_of("user/nodules"), "v2": mix_of("user/nodules", revision="v2")}\n"""
MISSING = """found |= {"bare": mix_of("user/bare"), "no revision": mix_of("user/nodules", revision="v3")}\n"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Processes that share one hub and one cache: what the first pushed and the second loaded."""
    folder, hub = tmp_path_factory.mktemp("hub"), HubServer()

    def run(code, commit="", **environment):
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}
        env |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), **environment}
        known = f"COMMIT, ELSEWHERE = {commit!r}, {str(folder / 'elsewhere')!r}"
        program = f"{BEGIN}\n{known}\n{code}\nprint(json.dumps(found))"
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    pushed = run(PUSH)
    commit = pushed["url"].rpartition("/")[2]
    yield SimpleNamespace(hub=hub, run=run, pushed=pushed, commit=commit, loaded=run(CACHED + MISSING + LOAD, commit))
    hub.shutdown()
    hub.server_close()


def test_what_is_had_from_the_hub_is_what_was_pushed(session):
    (first, second, third), loaded, hub = session.pushed["made"], session.loaded, session.hub
    assert loaded["main"] == loaded["commit"] == loaded["local only"] == first
    assert loaded["v2"] == second and loaded["bare, prior given"] == third

    # One repository holds it all, in one commit; a branch is made and leaves main alone.
    files = hub.files("user/nodules")
    assert files.keys() == {FILE, PRIOR, CONFIG, CARD} and json.loads(files[CONFIG])["image_size"] == 16
    assert all(words in files[CARD].decode() for words in (first[0], "a phantom", "library_name: carim_aug"))
    assert hub.private == {"user/nodules": True, "user/bare": False, "user/again": False}
    assert session.pushed["url"] == f"{hub.address}/user/nodules/commit/{session.commit}"
    tips = {branch: hub.messages[commit] for branch, commit in hub.branches["user/nodules"].items()}
    assert tips == {"main": "the first", "v2": "the second"} and hub.branches["user/nodules"]["main"] == session.commit
    assert hub.files("user/bare").keys() == {FILE, CONFIG, CARD}
    assert hub.files("user/again")[PRIOR] == files[PRIOR]  # a prior beside loaded weights goes where they go


def test_without_a_hub_the_cache_serves_and_what_is_missing_is_named(session):
    cached, nobody = {case: session.loaded[case] for case in ("main", "v2")}, "http://127.0.0.1:9"
    assert session.run(CACHED, HF_ENDPOINT=nobody) == cached
    found = session.run(CACHED + MISSING, HF_ENDPOINT=nobody, HF_HUB_OFFLINE="1")
    assert found | cached == found
    for case in ("bare", "no revision"):
        assert "is not in the local cache" in found[case] and "go online" in found[case]
    assert "user/bare has no prior.safetensors" in session.loaded["bare"]
    for case, words in (("no revision", "at revision 'v3'"), ("no repository", "user/nobody"), ("no token", "401")):
        assert words in session.loaded[case] and FILE in session.loaded[case]
