"""The fit of the usual view's network: its file is read by `usual_view`, its batches are what their labels say."""

import pytest
import torch

from carim_aug.ops.orientation import WEIGHTS, usual_view, view_chances
from carim_aug.ops.sealed import digest, read_sealed
from train.views import (
    BATCH,
    INVERTED,
    KINDS,
    NO_CHEST,
    ROTATED,
    SIDE,
    TRANSPOSED,
    UPSIDE_DOWN,
    draw_chests,
    fit_network,
    main,
    orient,
    rejected_shares,
    save_network,
    varied_batch,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def chests():
    return draw_chests(16, 0)


def test_images_are_turned_as_their_labels_say(chests):
    image = chests[:1]
    ways = {
        0: (image, image.flip(3)),
        INVERTED: [
            x for turned in (image, image.mT) for x in (turned, turned.flip(2), turned.flip(3), turned.flip(2, 3))
        ],
        UPSIDE_DOWN: (image.flip(2), image.flip(2, 3)),
        ROTATED: (image.rot90(1, (2, 3)), image.rot90(3, (2, 3))),
        TRANSPOSED: (image.mT, image.mT.flip(2, 3)),
    }
    for label, expected in ways.items():
        turned = orient(image.expand(200, -1, -1, -1), torch.full((200,), label), rng())
        same = torch.stack([(turned == way).flatten(1).all(1) for way in expected])
        assert same.any(0).all() and same.any(1).all(), label


def test_batches_hold_all_classes_and_their_usual_and_turned_images_are_seen_as_such(chests):
    images, labels = varied_batch(chests, rng())
    assert images.shape == (BATCH, 1, SIDE, SIDE) and images.isfinite().all() and labels.unique().numel() == 6
    assert (view_chances(images).argmax(1) == labels).float().mean() > 0.9  # by the bundled network
    again, same_labels = varied_batch(chests, rng())
    assert torch.equal(images, again) and torch.equal(labels, same_labels)


@pytest.mark.parametrize("kind", sorted(set(KINDS), key=lambda kind: kind.__name__))
def test_what_is_no_chest_has_the_chests_shape_and_is_found(chests, kind):
    before = chests.clone()
    images = kind(chests, rng())
    assert images.shape == chests.shape and images.isfinite().all() and torch.equal(chests, before)
    assert view_chances(images).argmax(1).eq(NO_CHEST).float().mean() > 0.7


def test_bundled_file_rejects_what_is_changed_and_nothing_else(chests):
    shares = rejected_shares(chests, WEIGHTS)
    assert shares.pop("unchanged") == 0 and shares.pop("half of the area") <= 0.25
    assert set(shares.values()) == {1}


@pytest.mark.train
def test_a_short_fit_learns_and_is_the_same_for_a_seed_and_leaves_the_global_stream(chests, tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    state = torch.get_rng_state()
    for path, seed in zip(files, (0, 0, 1), strict=True):
        save_network(fit_network(chests, steps=25, seed=seed), path, images=16, drawn=0, steps=25, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (digest(read_sealed(path)[0], {}) for path in files)
    assert first == same != other
    upside_down = view_chances(chests.flip(2), weights=files[0])[:, UPSIDE_DOWN]
    assert upside_down.mean() > view_chances(chests, weights=files[0])[:, UPSIDE_DOWN].mean() + 0.04


@pytest.mark.train
def test_command_writes_a_file_like_the_bundled_one_and_prints_its_rates(phantom_data, tmp_path, capsys):
    out = tmp_path / "views.safetensors"
    main(["--data", str(phantom_data), "--out", str(out), "--steps", "2"])
    assert len(usual_view(draw_chests(3, 0), weights=out)) == 3
    (arrays, texts, intact), (bundled, bundled_texts, _) = read_sealed(out), read_sealed(WEIGHTS)
    assert intact and {k: (v.shape, v.dtype) for k, v in arrays.items()} == {
        k: (v.shape, v.dtype) for k, v in bundled.items()
    }
    assert texts.keys() == bundled_texts.keys() and "24 images" in texts["training_data"]
    assert "--steps 2 --seed 0" in texts["recipe"]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["rejected of val", "rejected of phantoms"]
    assert all("turned by 180 " in line and line.count("%") == 9 for line in said)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"--steps": "0"}, "steps must be at least 1 .*got 0 and 0"),
        ({"--seed": "-1"}, "seed from 0 to .*got 9000 and -1"),
        ({"--out": "nowhere/views.safetensors"}, "out must be a file in a folder that exists, got nowhere/views"),
        ({"--out": "."}, "out must be a file in a folder that exists, got ."),
        ({"--data": "nowhere"}, "nowhere"),
    ],
)
def test_bad_options_end_the_command_in_one_line(phantom_data, tmp_path, options, words):
    every = {"--data": str(phantom_data), "--out": str(tmp_path / "views.safetensors"), **options}
    with pytest.raises(SystemExit, match=f"error: .*{words}"):
        main([word for pair in every.items() for word in pair])
