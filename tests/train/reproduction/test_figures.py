"""Figures 3 to 7: samples, same-noise pictures, class activation, t-SNE, with generators whose answers are known."""

import json

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import NearestNeighbors
from tiny import generator, global_states_untouched
from torch import nn

from carim_aug.ops.random import noise
from train.classifier.densenet import ChestClassifier
from train.metrics.statistics import neighbour_mixing, paired_test
from train.reproduction.figures.cam import COMPARISONS, REGIONS, activation_inside, histograms
from train.reproduction.figures.same_noise import difference_figures, difference_grid, same_noise_grid
from train.reproduction.figures.samples import draw_boxes, generate, pairs_of
from train.reproduction.figures.tsne import CONTROL, CROP, SETS, crops, embed, embedding_figures, image_sets, scatter

pytestmark = pytest.mark.train


# --- Figures 3 and 6: the same noise ---


def test_difference_lies_in_the_mask_of_a_model_that_obeys(bright, by_class_only, bundled_prior):
    row = difference_figures(bright(), bundled_prior, n=20, seed=3, batch=8)
    assert row["places"] is True and row["n"] == 20
    assert row["energy"]["value"] == pytest.approx(1) and row["hit"]["value"] == 1
    assert 0 < row["hit_chance"]["value"] < row["energy_chance"]["value"] < 0.05
    assert json.dumps(json.loads(json.dumps(row))) == json.dumps(row)
    # Of a model without places it lies there by chance.
    row = difference_figures(by_class_only(), bundled_prior, n=200, seed=3)
    assert row["places"] is False
    # A quarter of the image brightens, so a mask that lies in it holds four times its share of the image.
    assert 0 < row["energy"]["value"] < 4 * row["energy_chance"]["value"] < 0.1
    assert row["hit"]["value"] < 0.05


def test_pairs_are_the_same_whatever_the_batch_the_number_and_the_size(bright, bundled_prior):
    with global_states_untouched():
        few, many = (pairs_of(generator(), bundled_prior, n, seed=5, batch=b) for n, b in ((3, 2), (7, 7)))
    assert few.seeds == many.seeds[:3] and torch.equal(few.boxes, many.boxes[:3])
    assert torch.allclose(few.nodule, many.nodule[:3], atol=1e-5) and not torch.equal(few.nodule, few.without)
    other = pairs_of(generator(), bundled_prior, 3, seed=6)
    assert other.seeds != few.seeds and not torch.equal(other.boxes, few.boxes)
    small, large = (pairs_of(bright(size), bundled_prior, 4, seed=1).boxes for size in (32, 96))
    assert torch.allclose(small * 3, large, atol=1e-4)


def test_images_are_generated_in_batches(bright):
    source, boxes = bright(), torch.tensor([[0.25, 0.5, 0.5, 0.75]]).repeat(10, 1)
    images = generate(source, boxes, list(range(10)), batch=4)
    assert images.shape == (10, 1, 48, 48) and source.calls == [4, 4, 2]
    added = images - generate(source, None, list(range(10)))
    assert torch.allclose(added[:, :, 24:36, 12:24], torch.tensor(0.5)) and added.sum() == pytest.approx(10 * 72)


def test_boxes_apart_touch_nothing(bundled_prior):
    first = draw_boxes(bundled_prior, 60, seed=1)
    apart = draw_boxes(bundled_prior, 60, seed=2, apart=first)
    overlap = torch.minimum(first[:, 2:], apart[:, 2:]) - torch.maximum(first[:, :2], apart[:, :2])
    assert bool((overlap.min(dim=1).values < 0).all())
    assert torch.equal(apart, draw_boxes(bundled_prior, 60, seed=2, apart=first))


def test_rows_of_a_model_without_places_have_no_outline(bright, by_class_only, bundled_prior):
    def is_coloured(source):
        sheet = np.asarray(same_noise_grid({"A": source}, bundled_prior, columns=3, size=40)).astype(int)
        panels = sheet[:, -3 * 44 - 4 :]
        return panels.max(axis=2) - panels.min(axis=2) > 100

    obeys = is_coloured(bright())
    assert obeys[44:88].any() and not obeys[:44].any() and not is_coloured(by_class_only()).any()


def test_grid_of_models_of_several_sizes_says_what_it_is(bright, by_class_only, real_images, bundled_prior):
    models = {"obeys": bright(), "class only": by_class_only(32), "tiny": generator()}
    sheet = same_noise_grid(models, bundled_prior, real=real_images(), columns=4, seed=2, size=40)
    # Real: three rows; models that know the place: three each; the other: two.
    assert sheet.height >= 11 * 44 + 4 and sheet.mode == "RGB"
    assert all(word in sheet.info["carim_aug"] for word in ("Synthetic but the rows of real images", "obeys", "seed 2"))
    assert "real" not in same_noise_grid({"tiny": generator()}, bundled_prior, columns=1, size=40).info["carim_aug"]


def test_same_seed_gives_the_same_pictures(real_images, bundled_prior):
    for draw in (
        lambda **more: same_noise_grid({"tiny": generator()}, bundled_prior, real=real_images(), **more),
        lambda **more: difference_grid(generator(), bundled_prior, **more),
    ):
        first, again, other = (draw(columns=2, seed=seed, size=40).tobytes() for seed in (0, 0, 1))
        assert first == again != other


def test_colours_of_the_difference_are_signed_and_their_scale_is_given(bright, by_class_only, bundled_prior):
    sheet = difference_grid(bright(), bundled_prior, columns=2, seed=0, size=48)
    assert "darkest red +0.5," in sheet.info["carim_aug"]
    row = np.asarray(sheet)[4 + 2 * 52 : 4 + 2 * 52 + 48, -2 * 52 :].astype(int)
    red, blue = row[..., 0] - row[..., 2] > 60, row[..., 2] - row[..., 0] > 60
    assert red.any() and not blue.any()
    about = difference_grid(by_class_only(), bundled_prior, columns=1, size=48).info["carim_aug"]
    assert "takes of the mask only that there is one" in about


# --- Figure 7: class activation ---
class Eye(nn.Module):
    """A classifier of one finding, whose map is the image itself above `floor`, reduced to a quarter of its side."""

    def __init__(self, floor: float = 0.1, weight: float = 1.0) -> None:
        super().__init__()
        self.floor, self.activation, self.head = floor, nn.AvgPool2d(4), nn.Linear(1, 1)
        nn.init.constant_(self.head.weight, weight)
        nn.init.constant_(self.head.bias, -0.5)
        self.eval().requires_grad_(False)

    def target(self, finding):
        return ["Nodule"].index(finding)

    def forward(self, images):
        return self.head(self.activation((images - self.floor).relu()).mean(dim=(2, 3)))


@pytest.fixture
def look(bright, bundled_prior):
    dim = bright(64)
    dim.level, dim.spread = 0.2, 0.0  # grey images of 0.2, bright in the mask
    return lambda eyes, source=dim, **options: activation_inside(source, bundled_prior, eyes, **options)


def test_paired_test_is_that_of_scipy_and_of_paper():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(60, generator=generator) + 0.1, torch.rand(60, generator=generator)
    row, x, y = paired_test(a, b), a.double().numpy(), b.double().numpy()
    test, change = stats.ttest_rel(x, y), x - y
    half = stats.t.ppf(0.975, 59) * change.std(ddof=1) / 60**0.5
    expected = (60, test.statistic, test.pvalue, change.mean() - half, change.mean() + half, (change > 0).mean())
    assert [row[k] for k in ("n", "t", "p", "low", "high", "above")] == pytest.approx(expected)
    assert row["rank_p"] == pytest.approx(stats.wilcoxon(x, y).pvalue)
    # Differences 1, 2, 3: mean 2, standard deviation 1, t = 2 / (1 / sqrt(3)).
    row = paired_test(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert (row["value"], row["cohens_d"], row["t"], row["above"]) == pytest.approx((2, 2, 2 * 3**0.5, 1))
    # Differences that do not vary have no test.
    for a, b in ((torch.ones(4), torch.zeros(4)), (torch.ones(1), torch.zeros(1)), (torch.ones(0), torch.ones(0))):
        row = paired_test(a, b)
        assert row["n"] == len(a) and all(np.isnan(value) for name, value in row.items() if name != "n")
    with pytest.raises(ValueError, match=r"got \(3,\) and \(4,\)"):
        paired_test(torch.zeros(3), torch.zeros(4))


def test_map_that_sees_the_nodule_is_bright_inside_and_one_that_does_not_passes_no_test(look):
    row = look({"eye": Eye(floor=0.3)}, n=30, seed=1)["classifiers"]["eye"]
    assert row["map_side"] == 16 and row["dead"]["value"] == 0 and row["dead_without"]["value"] == 1
    assert row["means"]["inside"]["value"] > 0.4 > 0.05 > row["means"]["outside"]["value"]
    assert row["means"]["moved_inside"]["value"] < 0.05
    assert row["tests"]["inside - outside"]["p"] < 1e-6 and row["tests"]["inside - outside"]["above"] == 1
    assert row["tests"]["inside - inside a moved mask"]["p"] < 1e-6
    # No image without a nodule has a living map, so these are left out and counted.
    assert row["tests"]["inside - the same without a nodule"]["n"] == 0
    assert row["signed"]["n"] == 30 and row["signed"]["value"] > 0 and row["rises"]["value"] == 1
    # A classifier that sees no nodule passes no test: with weight -1, all is dead.
    row = look({"eye": Eye(weight=-1.0)}, n=10, seed=1)["classifiers"]["eye"]
    assert row["dead"]["value"] == row["dead_without"]["value"] == 1
    assert all(test["n"] == 0 for test in row["tests"].values())
    assert all(sum(counts) == 0 for counts in row["histograms"].values())
    assert row["signed"]["value"] < 0 and row["rises"]["value"] == 0


def test_map_that_looks_at_a_place_passes_anns_test_without_a_nodule(bright, bundled_prior, look):
    # A model that ignores its mask, images bright where nodules often lie: the test of Ann (2021) finds a nodule
    # anyhow, the comparison with the image without one does not.
    class Lungs(bright):
        def images(self, masks, seeds):
            return 0.5 * bundled_prior.field.float() + 0.01 * noise(seeds, 7)[:, :1, None, None].abs()

    row = look({"eye": Eye()}, Lungs(64), n=30, seed=1)["classifiers"]["eye"]["tests"]
    assert row["inside - outside"]["p"] < 1e-6 and row["without a nodule: inside - outside"]["p"] < 1e-6
    assert row["moved mask: inside - outside"]["p"] < 1e-6
    same = row["inside - the same without a nodule"]
    assert same["n"] == 30 and np.isnan(same["p"])  # no difference at all
    assert row["inside - inside a moved mask"]["p"] > 0.01


def test_histograms_count_every_pixel_of_living_maps(look):
    counts = look({"eye": Eye()}, n=6, seed=2, bins=10, batch=4)["classifiers"]["eye"]["histograms"]
    assert set(counts) == set(REGIONS) and all(len(row) == 10 for row in counts.values())
    assert sum(counts["inside"]) + sum(counts["outside"]) == 6 * 64 * 64
    # An image without a nodule is grey throughout: its map is 1 everywhere.
    assert counts["without_inside"][-1] == sum(counts["without_inside"]) == sum(counts["inside"])


def test_real_networks_give_the_same_whatever_the_batch(look):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ChestClassifier(("Mass", "Nodule"), size=32).eval().requires_grad_(False)
    eyes, options = {"a": network, "b": Eye()}, {"source": generator(), "n": 5, "seed": 4}
    with global_states_untouched():
        first = look(eyes, batch=5, **options)
    assert json.dumps(first) == json.dumps(look(eyes, batch=5, **options))
    second = look(eyes, batch=2, **options)
    assert set(first["classifiers"]) == {"a", "b"} and first["places"] is True and first["size"] == 32
    for name in ("a", "b"):
        rows = [run["classifiers"][name]["means"]["inside"]["value"] for run in (first, second)]
        assert rows[0] == pytest.approx(rows[1], abs=1e-3, nan_ok=True)
    assert set(first["classifiers"]["a"]["tests"]) == set(COMPARISONS)


def test_picture_has_a_panel_for_each_classifier(look):
    figures = look({"one": Eye(), "two": Eye(weight=-1.0)}, n=4, seed=1)
    picture = histograms(figures, title="Fig. 7")
    alone = histograms({**figures, "classifiers": {"one": figures["classifiers"]["one"]}}, title="Fig. 7")
    assert picture.width == 2 * alone.width and picture.info["carim_aug"].startswith("Fig. 7")
    assert picture.tobytes() == histograms(json.loads(json.dumps(figures)), title="Fig. 7").tobytes()


# --- Figures 4 and 5: t-SNE ---
def cloud(n, seed, *, side=8, shift=0.0):
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 0.2 + shift


def embed_clouds():
    sets = {"real normal": cloud(30, 1), "synthetic normal": cloud(40, 2), "real nodule": cloud(12, 3, shift=3.0)}
    return embed(sets, perplexity=5)


def test_share_of_neighbours_is_the_one_worked_on_paper_and_that_of_scikit_learn():
    # On a line: the first set at 0, 1, 10; the second at 2, 11, 12. Two neighbours each:
    # 0: 1 and 2; 1: 0 and 2; 10: 11 and 12. Of the second set: 1/2, 1/2, 1.
    first, second = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[2.0], [11.0], [12.0]])
    row = neighbour_mixing(first, second, k=2, draws=50)
    assert row["value"] == pytest.approx(2 / 3) and row["low"] < 2 / 3 < row["high"]
    assert row["expected"] == pytest.approx(3 / 5) and row["ratio"] == pytest.approx(10 / 9)
    first, second = cloud(40, 0).flatten(1), cloud(25, 1, shift=0.05).flatten(1)
    both = torch.cat([first, second]).numpy()
    nearest = NearestNeighbors(n_neighbors=8).fit(both).kneighbors(both[:40], return_distance=False)[:, 1:]
    assert neighbour_mixing(first, second, k=7, draws=1)["value"] == pytest.approx((nearest >= 40).mean())


def test_one_distribution_is_found_mixed_and_two_are_not():
    one, same = cloud(150, 5).flatten(1), cloud(100, 6).flatten(1)
    with global_states_untouched():
        row = neighbour_mixing(one, same, draws=300, seed=1)
    assert row["mixed"]["low"] < row["value"] < row["mixed"]["high"] and row["p"] > 0.05
    assert row["mixed"]["low"] < row["expected"] < row["mixed"]["high"]
    assert row == neighbour_mixing(one, same, draws=300, seed=1)
    assert row["mixed"] != neighbour_mixing(one, same, draws=300, seed=2)["mixed"]
    other = neighbour_mixing(one, same + 1, draws=300, seed=1)
    assert other["value"] == 0 and other["p"] == pytest.approx(1 / 301)


def test_embedding_parts_its_sets_and_says_what_it_is():
    with global_states_untouched():
        points = embed_clouds()
    assert points.map.shape == (82, 2) and points.pixels.shape == (82, 64)
    assert points.sets.bincount().tolist() == [30, 40, 12]
    assert points.about["n"] == {"real normal": 30, "synthetic normal": 40, "real nodule": 12}
    assert points.about["components"] == 50 and 0.9 < points.about["variance"] <= 1
    figures = embedding_figures(points, k=5, draws=20)
    assert set(figures["neighbours"]) == {"synthetic normal | real normal", "real nodule | real normal"}
    assert figures["neighbours"]["real nodule | real normal"]["map"]["value"] == 0
    assert figures["neighbours"]["synthetic normal | real normal"]["pixels"]["p"] > 0.01
    assert json.loads(json.dumps(figures)) == figures
    again = embed_clouds()
    assert torch.equal(points.map, again.map) and points.about == again.about
    picture = scatter(points, title="Fig. 4")
    assert picture.mode == "RGB" and picture.info["carim_aug"].startswith("Fig. 4; t-SNE, perplexity 5")
    assert picture.tobytes() == scatter(again, title="Fig. 4").tobytes()
    # Large images are reduced first.
    points = embed({"a": cloud(6, 0, side=20), "b": cloud(6, 1, side=20)}, perplexity=3, side=10)
    assert points.about["side"] == 10 and points.pixels.shape == (12, 100)
    assert points.about["components"] == 12  # no more than there are images


def test_crops_lie_at_their_places_and_inside():
    ramp = torch.arange(256.0).expand(1, 1, 256, 256) / 256  # brightness is x
    cut = crops(torch.cat([ramp, ramp.mT, ramp]), torch.tensor([[0.5, 0.1], [0.1, 0.5], [0.99, 0.5]]))
    assert cut.shape == (3, 1, CROP, CROP)
    assert (cut[0, 0, 0] * 256).tolist() == (cut[1, 0, :, 0] * 256).tolist() == list(range(103, 153))
    assert (cut[2, 0, 0] * 256).tolist() == list(range(206, 256))  # moved inside
    small = crops(ramp[..., ::4, ::4], torch.tensor([[0.5, 0.5]]))  # enlarged to 256 first
    assert small.shape == (1, 1, CROP, CROP) and torch.allclose(small[0, 0, 0], cut[0, 0, 0], atol=0.02)


def test_sets_are_real_images_and_synthetic_ones_at_their_masks(bright, by_class_only, real_images, bundled_prior):
    real = real_images(5)
    real.boxes[5] = real.boxes[5].repeat(9, 1)  # more boxes than an image may have
    real.boxes[6] = real.boxes[6].repeat(2, 1)
    sets = image_sets(bright(64), bundled_prior, real, n=7, seed=2)
    assert {name: len(images) for name, images in sets.images.items()} == dict(zip(SETS, (5, 4, 7, 7), strict=True))
    assert list(sets.crops) == [*SETS, CONTROL] and len(sets.crops[CONTROL]) == 5
    assert all(images.shape[1:] == (1, 64, 64) for images in sets.images.values())
    # This model brightens its mask alone: the crops' middle is bright, of nodules only.
    middle = slice(CROP // 2 - 1, CROP // 2 + 1)
    is_bright = {name: sets.crops[name][:, 0, middle, middle].mean(dim=(1, 2)) > 0.2 for name in SETS[2:]}
    assert is_bright["synthetic nodule"].float().mean() > 0.8 and not is_bright["synthetic normal"].any()
    again, other = (image_sets(bright(64), bundled_prior, real, n=7, seed=seed) for seed in (2, 3))
    assert all(torch.equal(sets.crops[name], again.crops[name]) for name in sets.crops)
    assert not torch.equal(sets.crops["synthetic nodule"], other.crops["synthetic nodule"])
    assert len(image_sets(by_class_only(), bundled_prior, real, n=3).images["synthetic nodule"]) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, p, real: same_noise_grid({}, p), "sources must be at least one"),
        (lambda a, p, real: same_noise_grid({"A": a}, p, columns=0), "n must be at least 1, got 0"),
        (lambda a, p, real: same_noise_grid({"A": a}, p, size=8), "size must be at least 32, got 8"),
        (lambda a, p, real: same_noise_grid({"A": a}, p, real=real(2), columns=3), "3 patients .* got 2"),
        (lambda a, p, real: difference_grid(a, p, size=8), "size must be at least 32, got 8"),
        (lambda a, p, real: difference_figures(a, p, n=0), "n must be at least 1, got 0"),
        (lambda a, p, real: difference_figures(a, p, batch=0), "batch must be at least 1, got 0"),
        (lambda a, p, real: generate(a, None, [0], batch=0), "batch must be at least 1, got 0"),
        (lambda a, p, real: draw_boxes(p, 2, seed=0, apart=torch.rand(1, 4)), "apart must be of 2 boxes, got 1"),
        (lambda a, p, real: draw_boxes(p, 1, seed=0, apart=torch.tensor([[0.0, 0, 1, 1]])), "got none in 200"),
        (lambda a, p, real: activation_inside(a, p, {}), "classifiers must be at least one"),
        (lambda a, p, real: activation_inside(a, p, {"eye": Eye().train()}), "eval mode, got 'eye' in training mode"),
        (lambda a, p, real: activation_inside(a, p, {"eye": Eye()}, n=1), "n must be at least 2, got 1"),
        (lambda a, p, real: activation_inside(a, p, {"eye": Eye()}, bins=1), "bins must be at least 2, got 1"),
        (lambda a, p, real: activation_inside(a, p, {"eye": Eye()}, batch=0), "batch must be at least 1, got 0"),
        (lambda a, p, real: embed({}), "sets must be images of one shape"),
        (lambda a, p, real: embed({"a": cloud(4, 0), "b": cloud(4, 0, side=9)}), "sets must be images of one shape"),
        (lambda a, p, real: embed({"a": cloud(4, 0), "b": cloud(0, 0)}), "sets must have at least one image each"),
        (lambda a, p, real: embed({"a": cloud(50, 0).long()}), "sets must be .* float, got .* torch.int64"),
        (lambda a, p, real: embed({"a": cloud(20, 0)}), "perplexity must be .* less than the 20 images, got 30"),
        (lambda a, p, real: neighbour_mixing(torch.zeros(3, 2), torch.zeros(3, 1)), r"got \(3, 2\), \(3, 1\)"),
        (
            lambda a, p, real: neighbour_mixing(torch.zeros(3, 2), torch.zeros(3, 2), k=6),
            "k must be .* the 6 points, got 6",
        ),
        (
            lambda a, p, real: neighbour_mixing(torch.zeros(3, 2), torch.zeros(3, 2), k=2, draws=0),
            "draws must be .* got 0",
        ),
        (lambda a, p, real: crops(torch.zeros(2, 1, 9, 9), torch.zeros(1, 2)), "centres must be of 2 images, got 1"),
    ],
)
def test_bad_arguments_are_refused(call, message, bright, real_images, bundled_prior):
    with pytest.raises(ValueError, match=message):
        call(bright(), bundled_prior, real_images)
