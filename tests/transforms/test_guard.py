import shutil
from functools import partial

import pytest
import torch
from tiny import Images, make_mix
from torch.utils.data import ConcatDataset, DataLoader, Subset, default_collate
from torchvision.transforms import v2

from carim_aug import SyntheticDataError, assert_real_only
from carim_aug.data import BoxCSV, ChestXray14, FolderPerClass
from carim_aug.data.provenance import MARKER, export_over

MIX = make_mix()


def collate_with_a_global(items):
    return MIX(*default_collate(items))


def holder(**parts):
    images = Images(1)
    images.__dict__.update(parts)
    return images


def synthetic():
    mix, images = make_mix(), Images(8)
    wrapped = mix.wrap(images)
    return {
        "MixedDataset": wrapped,
        "MixLoader": mix.loader(images, batch_size=4),
        "SyntheticNoduleMix": mix,
        r"Subset.dataset": Subset(wrapped, [0, 1]),
        r"ConcatDataset.datasets\[1\]": ConcatDataset([images, wrapped]),
        r"dataset.datasets\[0\].dataset": DataLoader(ConcatDataset([Subset(wrapped, [0])])),
        r"\[1\]": [images, wrapped],
        "collate_fn.mix": DataLoader(images, collate_fn=lambda items: mix(*default_collate(items))),
        "collate_fn.MIX": DataLoader(images, collate_fn=collate_with_a_global),
        "collate_fn.0": DataLoader(images, collate_fn=partial(lambda mix, items: mix(*items), mix)),
        "transform": holder(transform=mix),
        r"transform.transforms\[1\]": holder(transform=v2.Compose([v2.Identity(), mix])),
        "augment": holder(augment=mix),
        "planned": holder(planned=wrapped.planned),
    }


@pytest.mark.parametrize("place", synthetic())
def test_synthetic_samples_are_found_and_the_place_is_named(place):
    with pytest.raises(SyntheticDataError, match=rf"data must be real only, got synthetic nodules at \S*{place}:"):
        assert_real_only(synthetic()[place])


def test_real_data_and_a_disabled_mix_pass():
    images, mix = Images(8), make_mix()
    loaders = DataLoader(images), DataLoader(images, collate_fn=partial(default_collate))
    real = images, Subset(images, [0]), ConcatDataset([images]), *loaders, [images], None, torch.zeros(3)
    for thing in (*real, holder(transform=v2.Compose([v2.Identity()]))):
        assert_real_only(thing)
    data = [mix, mix.wrap(images), mix.loader(images)]
    mix.enabled = False
    assert_real_only(data)
    mix.enabled = True
    with pytest.raises(SyntheticDataError, match="mix.enabled = False"):
        assert_real_only(data)


def test_what_holds_itself_or_a_variable_that_is_not_yet_there_is_walked():
    circle = holder()
    circle.dataset = circle
    assert_real_only(circle)
    assert_real_only(DataLoader(Images(4), collate_fn=lambda items: later(items)))
    later = default_collate


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from carim_aug.tools.export import export

    folder = tmp_path_factory.mktemp("export") / "out"
    export(make_mix(insertion="whole"), folder, n=1, negatives=1)
    return folder


def test_exported_folders_are_not_real_and_an_unfinished_one_neither(exported, phantom_data, tmp_path):
    (tmp_path / "boxes.csv").write_text(f"image,x1,y1,x2,y2\n{sorted((exported / 'images').iterdir())[0]},1,2,3,4\n")
    shutil.copytree(exported, tmp_path / "cut")
    cut = ChestXray14(tmp_path / "cut")
    (tmp_path / "cut" / "complete.json").unlink()
    for data in (
        ChestXray14(exported),
        DataLoader(Subset(ChestXray14(exported), [0])),
        FolderPerClass(exported, classes=["images"]),
        BoxCSV("/", tmp_path / "boxes.csv", classes=["Nodule"], only_listed=True),
        cut,
    ):
        with pytest.raises(SyntheticDataError, match="exported synthetic images of .* at "):
            assert_real_only(data)
    (tmp_path / "cut" / MARKER).unlink()
    assert export_over([tmp_path / "cut" / "images"]) is None
    for data in (cut, ChestXray14(phantom_data)):
        assert_real_only(data)
