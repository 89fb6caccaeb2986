"""t-SNE and the nearest-neighbour test beside it, against cases worked on paper."""

import json

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from test_same_noise import Bright, patients
from tiny import global_states_untouched, prior

from train.reproduction.figures.tsne import (
    CONTROL,
    CROP,
    SETS,
    crops,
    embed,
    embedding_figures,
    film_sets,
    mixing,
    scatter,
)


def _drawn(n: int, seed: int, *, side: int = 8, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 0.2 + shift


def _points(seed: int = 0, **options):
    sets = {"real normal": _drawn(30, 1), "synthetic normal": _drawn(40, 2), "real nodule": _drawn(12, 3, shift=3.0)}
    return embed(sets, seed=seed, perplexity=5, **options)


def test_share_of_neighbours_is_the_one_worked_on_paper():
    # On a line: the first set at 0, 1, 10; the second at 2, 11, 12. Two neighbours each:
    # 0: 1 and 2; 1: 0 and 2; 10: 11 and 12. Of the second set: 1/2, 1/2, 1.
    first, second = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[2.0], [11.0], [12.0]])
    row = mixing(first, second, k=2, draws=50)
    assert row["value"] == pytest.approx(2 / 3)
    assert row["expected"] == pytest.approx(3 / 5)
    assert row["ratio"] == pytest.approx(10 / 9)
    assert row["low"] < 2 / 3 < row["high"]


def test_share_of_neighbours_is_that_of_scikit_learn():
    first, second = _drawn(40, 0).flatten(1), _drawn(25, 1, shift=0.05).flatten(1)
    row = mixing(first, second, k=7, draws=1)
    both = torch.cat([first, second]).numpy()
    nearest = NearestNeighbors(n_neighbors=8).fit(both).kneighbors(both[:40], return_distance=False)[:, 1:]
    assert row["value"] == pytest.approx((nearest >= 40).mean())


def test_one_distribution_is_found_mixed_and_two_are_not():
    one, same = _drawn(150, 5).flatten(1), _drawn(100, 6).flatten(1)
    row = mixing(one, same, draws=300, seed=1)
    assert row["mixed"]["low"] < row["value"] < row["mixed"]["high"] and row["p"] > 0.05
    assert row["mixed"]["low"] < row["expected"] < row["mixed"]["high"]
    other = mixing(one, same + 1, draws=300, seed=1)
    assert other["value"] == 0 and other["p"] == pytest.approx(1 / 301)


def test_permutations_have_their_own_seed():
    one, same = _drawn(20, 5).flatten(1), _drawn(20, 6).flatten(1)
    with global_states_untouched():
        first = mixing(one, same, draws=20, seed=1)
    assert first == mixing(one, same, draws=20, seed=1)
    assert first["mixed"] != mixing(one, same, draws=20, seed=2)["mixed"]


def test_embedding_keeps_its_sets_apart_and_says_what_it_is():
    points = _points()
    assert points.map.shape == (82, 2) and points.pixels.shape == (82, 64)
    assert points.sets.bincount().tolist() == [30, 40, 12]
    assert points.about["n"] == {"real normal": 30, "synthetic normal": 40, "real nodule": 12}
    assert points.about["components"] == 50 and 0.9 < points.about["variance_kept"] <= 1
    figures = embedding_figures(points, k=5, draws=20)
    assert set(figures["neighbours"]) == {"synthetic normal | real normal", "real nodule | real normal"}
    assert figures["neighbours"]["real nodule | real normal"]["map"]["value"] == 0
    assert figures["neighbours"]["synthetic normal | real normal"]["pixels"]["p"] > 0.01
    assert json.loads(json.dumps(figures)) == figures


def test_same_seed_gives_the_same_map():
    with global_states_untouched():
        first = _points(seed=3)
    second = _points(seed=3)
    assert torch.equal(first.map, second.map) and first.about == second.about


def test_large_films_are_reduced_before_they_are_embedded():
    points = embed({"a": _drawn(6, 0, side=20), "b": _drawn(6, 1, side=20)}, perplexity=3, side=10)
    assert points.about["side"] == 10 and points.pixels.shape == (12, 100)
    assert points.about["components"] == 12  # no more than there are images


def test_crops_lie_at_their_places_and_inside():
    ramp = torch.arange(256.0).expand(1, 1, 256, 256) / 256  # brightness is x
    cut = crops(torch.cat([ramp, ramp.mT, ramp]), torch.tensor([[0.5, 0.1], [0.1, 0.5], [0.99, 0.5]]))
    assert cut.shape == (3, 1, CROP, CROP)
    assert (cut[0, 0, 0] * 256).tolist() == list(range(103, 153))
    assert (cut[1, 0, :, 0] * 256).tolist() == list(range(103, 153))
    assert (cut[2, 0, 0] * 256).tolist() == list(range(206, 256))  # moved inside
    small = crops(ramp[..., ::4, ::4], torch.tensor([[0.5, 0.5]]))  # enlarged to 256 first
    assert small.shape == (1, 1, CROP, CROP)
    assert torch.allclose(small[0, 0, 0], cut[0, 0, 0], atol=0.02)


def test_sets_are_real_films_and_synthetic_ones_at_their_masks():
    real = patients(5)
    real.films[1] = 0  # a second box of the first film
    sets = film_sets(Bright(64), prior(), real, n=7, seed=2)
    assert {name: len(films) for name, films in sets.films.items()} == dict(zip(SETS, (5, 4, 7, 7), strict=True))
    assert list(sets.crops) == [*SETS, CONTROL] and len(sets.crops[CONTROL]) == 5
    assert all(films.shape[1:] == (1, 64, 64) for films in sets.films.values())
    # This model brightens its mask alone: the crops' middle is bright, of nodules only.
    middle = slice(CROP // 2 - 1, CROP // 2 + 1)
    bright = {name: sets.crops[name][:, 0, middle, middle].mean(dim=(1, 2)) > 0.2 for name in SETS[2:]}
    assert bool(bright["synthetic nodule"].float().mean() > 0.8) and not bright["synthetic normal"].any()
    again = film_sets(Bright(64), prior(), real, n=7, seed=2)
    assert all(torch.equal(sets.crops[name], again.crops[name]) for name in sets.crops)
    other = film_sets(Bright(64), prior(), real, n=7, seed=3)
    assert not torch.equal(sets.crops["synthetic nodule"], other.crops["synthetic nodule"])


def test_picture_is_drawn_the_same_twice():
    points = _points()
    picture = scatter(points, title="Fig. 4")
    assert picture.mode == "RGB" and picture.info["carim_aug"].startswith("Fig. 4; t-SNE, perplexity 5")
    assert picture.tobytes() == scatter(points, title="Fig. 4").tobytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embed({}), "sets must be images of one shape"),
        (lambda: embed({"a": _drawn(4, 0), "b": _drawn(4, 0, side=9)}), "sets must be images of one shape"),
        (lambda: embed({"a": _drawn(4, 0), "b": _drawn(0, 0)}), "at least one image each"),
        (lambda: embed({"a": (_drawn(50, 0)).long()}), "float, got .* torch.int64"),
        (lambda: embed({"a": _drawn(20, 0)}), "perplexity must be at least 1 and less than the 20 images, got 30"),
        (lambda: embedding_figures(_points(), questions=[("real normal", "b")]), "questions must be about sets .*'b'"),
        (lambda: mixing(torch.zeros(3, 2), torch.zeros(3, 1)), r"got \(3, 2\), \(3, 1\)"),
        (lambda: mixing(torch.zeros(3, 2), torch.zeros(3, 2), k=6), "less than the 6 points, got 6"),
        (lambda: mixing(torch.zeros(3, 2), torch.zeros(3, 2), k=2, draws=0), "draws must be at least 1, got 0"),
        (lambda: crops(torch.zeros(2, 1, 9, 9), torch.zeros(1, 2)), "centres must be of 2 films, got 1"),
    ],
)
def test_bad_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
