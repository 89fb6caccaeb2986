import shutil
from functools import partial

import pytest
import torch
from tiny import Films, make_mix
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate
from torchvision.transforms import v2

from carim_aug import SyntheticDataError, assert_real_only
from carim_aug.data import BoxCSV, ChestXray14, FolderPerClass
from carim_aug.data.provenance import MARKER, export_over
from carim_aug.tools.export import COMPLETE, export

MIX = make_mix()


def collate_with_a_global(items):
    return MIX(*default_collate(items))


class Holder(Dataset):
    def __init__(self, **parts):
        self.__dict__.update(parts)

    def __len__(self):
        return 1


def synthetic():
    mix, films = make_mix(), Films(8)
    wrapped = mix.wrap(films)
    return {
        "data": wrapped,
        "MixLoader": mix.loader(films, batch_size=4),
        r"dataset": Subset(wrapped, [0, 1]),
        r"datasets\[1\]": ConcatDataset([films, wrapped]),
        r"dataset.datasets\[0\].dataset": DataLoader(ConcatDataset([Subset(wrapped, [0])])),
        r"\[1\]": [films, wrapped],
        "collate_fn.mix": DataLoader(films, collate_fn=lambda items: mix(*default_collate(items))),
        "collate_fn.MIX": DataLoader(films, collate_fn=collate_with_a_global),
        "collate_fn.0": DataLoader(films, collate_fn=partial(lambda mix, items: mix(*items), mix)),
        "transform": Holder(transform=mix),
        r"transform.transforms\[1\]": Holder(transform=v2.Compose([v2.Identity(), mix])),
        "augment": Holder(augment=mix),
        "planned": Holder(planned=wrapped.planned),
    }


@pytest.mark.parametrize("place", synthetic())
def test_synthetic_samples_are_found_and_the_place_is_named(place):
    with pytest.raises(SyntheticDataError, match=f"data must be real only, got synthetic nodules at .*{place}"):
        assert_real_only({**synthetic(), "data": make_mix().wrap(Films(4))}[place] if place != "data" else _wrapped())


def _wrapped():
    class data(type(make_mix().wrap(Films(4)))):  # the path begins with the class's name
        pass

    wrapped = make_mix().wrap(Films(4))
    wrapped.__class__ = data
    return wrapped


def test_real_data_pass():
    films = Films(8)
    for data in (films, Subset(films, [0]), ConcatDataset([films]), DataLoader(films), [films], None, torch.zeros(3)):
        assert_real_only(data)
    assert_real_only(Holder(transform=v2.Compose([v2.Identity()])))
    assert_real_only(DataLoader(films, collate_fn=partial(default_collate)))


def test_a_disabled_mix_is_real_only():
    mix = make_mix()
    data = [mix, mix.wrap(Films(8)), mix.loader(Films(8))]
    mix.enabled = False
    assert_real_only(data)
    mix.enabled = True
    for part in data:
        with pytest.raises(SyntheticDataError, match="mix.enabled = False"):
            assert_real_only(part)


def test_a_data_set_that_holds_itself_is_walked_once():
    holder = Holder()
    holder.dataset = holder
    assert_real_only(holder)


def test_a_function_of_which_a_variable_is_not_yet_there_is_walked():
    def outer():
        def collate(items):
            return later(items)

        assert_real_only(DataLoader(Films(4), collate_fn=collate))
        later = default_collate
        return later

    assert outer() is default_collate


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    export(make_mix(), folder, n=1, normal=1)
    return folder


def test_exported_folders_are_not_real(exported, phantom_data, tmp_path):
    (tmp_path / "boxes.csv").write_text(f"image,x1,y1,x2,y2\n{sorted((exported / 'images').iterdir())[0]},1,2,3,4\n")
    for data in (
        ChestXray14(exported),
        DataLoader(Subset(ChestXray14(exported), [0])),
        FolderPerClass(exported, classes=["images"]),
        BoxCSV("/", tmp_path / "boxes.csv"),
    ):
        with pytest.raises(SyntheticDataError, match="exported synthetic images of .* at "):
            assert_real_only(data)
    assert_real_only(ChestXray14(phantom_data))


def test_an_unfinished_export_is_not_real_either(tmp_path, exported):
    folder = tmp_path / "cut"
    shutil.copytree(exported, folder)
    data = ChestXray14(folder)
    (folder / COMPLETE).unlink()
    with pytest.raises(SyntheticDataError):
        assert_real_only(data)
    (folder / MARKER).unlink()
    assert export_over([folder / "images"]) is None
    assert_real_only(data)
