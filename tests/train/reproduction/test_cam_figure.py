"""Maps inside and outside the mask: the tests against scipy, the regions with a classifier whose map is known."""

import json

import numpy as np
import pytest
import torch
from scipy import stats
from test_same_noise import Bright
from tiny import generator, global_states_untouched, prior
from torch import nn

from train.classifier.densenet import ChestClassifier
from train.reproduction.figures.cam import COMPARISONS, REGIONS, activation_inside, histograms, paired


class Eye(nn.Module):
    """A classifier of one finding, whose map is the film itself above `floor`, reduced to a quarter of its side."""

    def __init__(self, floor: float = 0.1, weight: float = 1.0) -> None:
        super().__init__()
        self.floor, self.activation, self.head = floor, nn.AvgPool2d(4), nn.Linear(1, 1)
        nn.init.constant_(self.head.weight, weight)
        nn.init.constant_(self.head.bias, -0.5)
        self.eval().requires_grad_(False)

    def target(self, finding: str) -> int:
        if finding != "Nodule":
            raise ValueError(f"finding must be Nodule, got {finding!r}")
        return 0

    def forward(self, images):
        return self.head(self.activation((images - self.floor).relu()).mean(dim=(2, 3)))


class Dim(Bright):
    """Grey films of 0.2, bright in the mask."""

    def __call__(self, noise, masks):
        return 0.2 + 0.5 * masks


def test_paired_test_is_that_of_scipy():
    stream = torch.Generator().manual_seed(0)
    a, b = torch.rand(60, generator=stream) + 0.1, torch.rand(60, generator=stream)
    row, x, y = paired(a, b), a.double().numpy(), b.double().numpy()
    test, change = stats.ttest_rel(x, y), x - y
    assert row["t"] == pytest.approx(test.statistic) and row["p"] == pytest.approx(test.pvalue)
    assert row["t"] == pytest.approx(change.mean() / (change.std(ddof=1) / 60**0.5))
    half = stats.t.ppf(0.975, 59) * change.std(ddof=1) / 60**0.5
    assert (row["low"], row["high"]) == pytest.approx((change.mean() - half, change.mean() + half))
    assert row["cohens_d"] == pytest.approx(change.mean() / change.std(ddof=1)) and row["n"] == 60
    assert row["rank_p"] == pytest.approx(stats.wilcoxon(x, y).pvalue)
    assert row["above"] == (change > 0).mean()


def test_paired_test_worked_on_paper():
    # Differences 1, 2, 3: mean 2, standard deviation 1, t = 2 / (1 / sqrt(3)).
    row = paired(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert row["value"] == 2 and row["cohens_d"] == 2 and row["t"] == pytest.approx(2 * 3**0.5) and row["above"] == 1


def test_differences_that_do_not_vary_have_no_test():
    for a, b in ((torch.ones(4), torch.zeros(4)), (torch.ones(1), torch.zeros(1)), (torch.ones(0), torch.ones(0))):
        row = paired(a, b)
        assert row["n"] == len(a) and all(np.isnan(value) for name, value in row.items() if name != "n")


def test_map_that_sees_the_nodule_is_bright_inside_and_nowhere_else():
    row = activation_inside(Dim(64), prior(), {"eye": Eye(floor=0.3)}, n=30, seed=1)["classifiers"]["eye"]
    assert row["map_side"] == 16 and row["dead"]["value"] == 0 and row["dead_without"]["value"] == 1
    assert row["means"]["inside"]["value"] > 0.4 > 0.05 > row["means"]["outside"]["value"]
    assert row["means"]["moved_inside"]["value"] < 0.05
    assert row["tests"]["inside - outside"]["p"] < 1e-6 and row["tests"]["inside - outside"]["above"] == 1
    assert row["tests"]["inside - inside a moved mask"]["p"] < 1e-6
    # No film without a nodule has a living map, so these are left out and counted.
    assert row["tests"]["inside - the same without a nodule"]["n"] == 0
    assert row["signed"]["n"] == 30 and row["signed"]["value"] > 0 and row["rises"]["value"] == 1


def test_map_that_sees_no_nodule_passes_no_test():
    # The film is grey but for the nodule, which lies below this classifier's floor: with weight -1, all is dead.
    row = activation_inside(Dim(64), prior(), {"eye": Eye(weight=-1.0)}, n=10, seed=1)["classifiers"]["eye"]
    assert row["dead"]["value"] == row["dead_without"]["value"] == 1
    assert all(test["n"] == 0 for test in row["tests"].values())
    assert all(sum(counts) == 0 for counts in row["histograms"].values())
    assert row["signed"]["value"] < 0 and row["rises"]["value"] == 0


def test_map_that_looks_at_a_place_passes_the_sources_test_without_a_nodule():
    # A model that ignores its mask, films bright where nodules often lie: the source's test finds a nodule anyhow, the
    # comparison with the film without one does not.
    field = prior().field.float()

    class Lungs(Bright):
        def __call__(self, noise, masks):
            return 0.5 * field.expand(len(noise), 1, 64, 64) + 0.01 * noise[:, :1, None, None].abs()

    row = activation_inside(Lungs(64), prior(), {"eye": Eye()}, n=30, seed=1)["classifiers"]["eye"]["tests"]
    assert row["inside - outside"]["p"] < 1e-6 and row["without a nodule: inside - outside"]["p"] < 1e-6
    assert row["moved mask: inside - outside"]["p"] < 1e-6
    same = row["inside - the same without a nodule"]
    assert same["n"] == 30 and np.isnan(same["p"])  # no difference at all
    assert row["inside - inside a moved mask"]["p"] > 0.01


def test_histograms_count_every_pixel_of_living_maps():
    figures = activation_inside(Dim(64), prior(), {"eye": Eye()}, n=6, seed=2, bins=10, batch=4)
    counts = figures["classifiers"]["eye"]["histograms"]
    assert set(counts) == set(REGIONS) and all(len(row) == 10 for row in counts.values())
    assert sum(counts["inside"]) + sum(counts["outside"]) == 6 * 64 * 64
    assert sum(counts["without_inside"]) == sum(counts["inside"])
    # A film without a nodule is grey throughout: its map is 1 everywhere.
    assert counts["without_inside"][-1] == sum(counts["inside"])


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ChestClassifier(("Mass", "Nodule"), size=32).eval().requires_grad_(False)


def test_real_networks_give_the_same_whatever_the_batch(network):
    looks = {"a": network, "b": Eye()}
    with global_states_untouched():
        first = activation_inside(generator(), prior(), looks, n=5, seed=4, batch=5)
    assert json.dumps(first) == json.dumps(activation_inside(generator(), prior(), looks, n=5, seed=4, batch=5))
    second = activation_inside(generator(), prior(), looks, n=5, seed=4, batch=2)
    assert set(first["classifiers"]) == {"a", "b"} and first["places"] is True and first["size"] == 32
    for name in ("a", "b"):
        rows = [run["classifiers"][name]["means"]["inside"]["value"] for run in (first, second)]
        assert rows[0] == pytest.approx(rows[1], abs=1e-3, nan_ok=True)
    assert set(first["classifiers"]["a"]["tests"]) == set(COMPARISONS)


def test_picture_has_a_panel_for_each_classifier():
    figures = activation_inside(Dim(64), prior(), {"one": Eye(), "two": Eye(weight=-1.0)}, n=4, seed=1)
    picture = histograms(figures, title="Fig. 7")
    alone = histograms({**figures, "classifiers": {"one": figures["classifiers"]["one"]}}, title="Fig. 7")
    assert picture.width == 2 * alone.width and picture.info["carim_aug"].startswith("Fig. 7")
    assert picture.tobytes() == histograms(json.loads(json.dumps(figures)), title="Fig. 7").tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classifiers": {}}, "classifiers must be at least one"),
        ({"classifiers": {"eye": Eye().train()}}, "eval mode, got 'eye' in training mode"),
        ({"n": 1}, "n must be at least 2, got 1"),
        ({"bins": 1}, "bins must be at least 2, got 1"),
        ({"finding": "Hernia"}, "finding must be Nodule, got 'Hernia'"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_told(options, message):
    classifiers = options.pop("classifiers", {"eye": Eye()})
    with pytest.raises(ValueError, match=message):
        activation_inside(Dim(64), prior(), classifiers, **{"n": 4, **options})


def test_samples_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"got \(3,\) and \(4,\)"):
        paired(torch.zeros(3), torch.zeros(4))
