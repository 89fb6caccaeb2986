"""Table 2: the counts of Ann (2021) by patient, the arms, the runs, and the table made of them."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import generator

from train.classifier import finetune as finetuning
from train.common.run import RunError
from train.common.splits import ann_split, count_images, read_part, write_split
from train.reproduction.table2 import table
from train.reproduction.table2.__main__ import main
from train.reproduction.table2.arms import ARMS, NUMBERS, SHARE, Sources, arm_batches, arm_counts, find_arm, real_images
from train.reproduction.table2.start import PRESETS as STARTS
from train.reproduction.table2.start import train_start
from train.reproduction.table2.table import comparisons, metrics, read_runs, table2, table2_text
from train.reproduction.table2.training import PRESETS, SWEPT, choose_arms, read_parts, run_arm

TINY = replace(PRESETS["tiny"], split="ann2021", test=3)
ANN = {"split": "ann2021", "test": 3}


@pytest.fixture(scope="module")
def official(phantom_data, tmp_path_factory):
    """The drawn chests as ChestX-ray14 comes: without a split of ours."""
    root = tmp_path_factory.mktemp("official")
    for path in phantom_data.iterdir():
        if path.name != "split.csv":
            (root / path.name).symlink_to(path)
    return root


@pytest.fixture(scope="module")
def written(official, tmp_path_factory):
    """The same with the split that keeps the test images of Ann (2021) from all recipes."""
    root = tmp_path_factory.mktemp("written")
    for path in official.iterdir():
        (root / path.name).symlink_to(path)
    write_split(root, test=3, val=0.3)
    return root


@pytest.fixture(scope="module")
def train(phantom_data):
    return read_part(phantom_data, "train", 32)


@pytest.fixture(scope="module")
def sources(templates, tmp_path_factory):
    """Everything that an arm may add, by an untrained generator of 32 pixels."""
    folder = tmp_path_factory.mktemp("weights")
    generator().save_pretrained(folder)
    return Sources(folder, folder, templates)


@pytest.fixture(scope="module")
def runs(written, sources, tmp_path_factory):
    """A function that runs an arm into a folder, and the folder of three arms, one of them with two seeds."""
    out = tmp_path_factory.mktemp("table2")
    start = train_start(STARTS["tiny"], data=written, out=out / "start", **ANN)
    parts = read_parts(written, TINY)

    def run(name: str, seed: int, folder=out / "runs", preset=TINY) -> dict:
        return run_arm(find_arm(name), parts, sources, preset, start=start, out=folder, seed=seed)

    for name, seed in (*((arm, 0) for arm in TINY.arms), ("duplicated", 1)):
        run(name, seed)
    return run, out / "runs"


# --- The split of Ann (2021) ---
def test_the_counts_of_ann_come_out_to_the_image_and_no_patient_is_on_both_sides():
    rng, nodule = np.random.default_rng(0), np.repeat([0, 1], [60_361, 6_331])
    patients = np.concatenate([rng.integers(0, 26_000, 60_361), rng.integers(24_000, 26_500, 6_331)])
    splits = [np.array(ann_split(nodule, patients, seed=seed)) for seed in (0, 1)]
    assert (splits[0] != splits[1]).any()
    for split in splits:
        assert np.bincount(nodule[split == "test"]).tolist() == [633, 633]
        assert np.bincount(nodule[split == "train"]).tolist() == [59_728, 5_698]
        assert not set(patients[split == "test"]) & set(patients[split == "train"])
    with pytest.raises(RunError, match="test must be met by whole patients, got 2 .* of 3 normal and 3"):
        ann_split(np.array([0, 0, 0, 1, 1, 1]), np.array([1, 1, 1, 2, 2, 2]), test=2)


def test_the_written_split_keeps_the_test_images_from_every_recipe(official, written):
    with pytest.raises(RunError, match="write split.csv first"):  # else generators would learn from test images
        read_part(official, "test", 32, split="ann2021", test=8)
    train, test = (read_part(written, part, 32, **ANN) for part in ("train", "test"))
    assert (len(test.normal), len(test.nodule)) == (3, 3)
    assert set(read_part(written, "test", 32, everything=True).patients.tolist()) == set(test.patients.tolist())
    assert not set(test.patients.tolist()) & set(train.patients.tolist())
    counts = count_images(official, **ANN)  # of the tables alone
    assert counts["test"] == {"normal": 3, "nodule": 3, "patients": 6}
    assert (counts["train"]["normal"], counts["train"]["nodule"]) == (len(train.normal), len(train.nodule))
    with pytest.raises(RunError, match="split.csv is there already"):
        write_split(written, test=3)
    with pytest.raises(RunError, match="split must be one of .* got 'mine'"):
        read_part(written, "train", 32, split="mine")


# --- Arms ---
def counts_of(*numbers: int) -> dict[str, int]:
    return dict(zip(("real normal", "real nodule", "synthetic normal", "synthetic nodule"), numbers, strict=True))


@pytest.mark.train
@pytest.mark.parametrize("name", [*ARMS, *(name.replace("@4", "@0.5") for name in SWEPT)])
def test_every_arm_holds_what_it_says_and_stays_balanced(name, train, sources):
    arm = find_arm(name)
    epochs, counts = arm_batches(arm, train, sources, batch=4, seed=1)
    n = round(arm.share * 8)
    assert arm.share == (float(name.partition("@")[2]) if "@" in name else SHARE if arm.source else 0)
    assert counts["Nodule"] == {"real": 8, "synthetic": n, "total": 8 + n}
    kinds = [(c, kind) for kind in ("real", "synthetic") for c in ("No Finding", "Nodule")]
    assert arm_counts(arm, 16, 8) == counts_of(*(counts[c][kind] for c, kind in kinds))
    assert counts["No Finding"]["total"] == (16 if name == "DS1" else 8 + n)
    batches, again = list(epochs(0)), list(epochs(0))
    shown = sum(len(images) for images, _ in batches)
    assert shown == (counts["Nodule"]["total"] + counts["No Finding"]["total"]) // 4 * 4
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, again, strict=True))


def test_arms_have_names_and_the_counts_of_ann():
    for number, word in NUMBERS.items():
        assert find_arm(number) == find_arm(word) == ARMS[word]
    assert find_arm("DS5@4") == find_arm("duplicated@4") != find_arm("duplicated")
    assert arm_counts(find_arm("DS1"), 59_728, 5_698) == counts_of(59_728, 5_698, 0, 0)
    assert arm_counts(find_arm("DS2"), 59_728, 5_698) == counts_of(5_698, 5_698, 0, 0)
    assert arm_counts(find_arm("DS4"), 59_728, 5_698) == counts_of(5_698, 5_698, 2_000, 2_000)
    assert arm_counts(find_arm("DS5"), 59_728, 5_698) == counts_of(7_698, 5_698, 0, 2_000)
    for name in ("DS0", "DS4@", "DS4@-1", "DS4@nan", "DS4@inf", "DS4@many", "DS2@1"):
        with pytest.raises(RunError, match=f"arms must be of .* got '{name}'"):
            find_arm(name)


def test_duplicates_are_the_train_splits_own_and_normal_images_are_drawn_by_the_seed(train):
    ((images, labels),) = list(arm_batches(find_arm("duplicated@1"), train, Sources(), batch=32, seed=0)[0](0))
    real, shown = train.images[train.nodule].flatten(1), images[labels == 1].flatten(1)
    assert len(shown) == 16 and all(bool((image == real).all(dim=1).any()) for image in shown)
    names = [set(real_images(ARMS["DS2"], train, 8, seed=s).names) for s in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    with pytest.raises(RunError, match="at least 40 normal images to train on for drawn-blob@4, got 16"):
        arm_batches(find_arm("DS7@4"), train, Sources(), batch=4, seed=0)


@pytest.mark.parametrize(("name", "needed"), [("DS3", "without"), ("random-places", "full"), ("ct", "ct_nodules")])
def test_what_an_arm_needs_is_asked_for_by_name(name, needed, train, capsys):
    with pytest.raises(RunError, match=f"{needed} must be given for {name} "):
        arm_batches(find_arm(name), train, Sources(), batch=4, seed=0)
    with pytest.raises(RunError, match=f"{needed} must be given for {name} "):
        choose_arms(["DS2", name], Sources(), asked=True)
    assert [arm.name for arm in choose_arms(["DS2", name, "DS5"], Sources(), asked=False)] == ["DS2", "duplicated"]
    assert f"{name} is left out: {needed} must be given" in capsys.readouterr().out


# --- Runs ---
@pytest.mark.train
def test_runs_repeat_themselves_to_the_last_digit_even_if_they_are_cut(runs, tmp_path, monkeypatch):
    run, folder = runs
    first, other = (read_runs(folder)["duplicated"][seed] for seed in (0, 1))
    again = run("duplicated", 0, tmp_path)
    assert again["images"] == first["images"] and again["images"] != other["images"]
    assert len(run("DS4-graft", 0)["weights"]["full"]) == len(again["start"]) == 64
    steps, descend = [], finetuning.descend

    def cut(*args, **options):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return descend(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetuning, "descend", cut)
        run("duplicated", 1, tmp_path)
    assert run("duplicated", 1, tmp_path)["images"] == other["images"]


@pytest.mark.train
def test_a_run_of_other_settings_is_refused_and_so_is_a_table_of_both(runs, tmp_path):
    run, folder = runs
    with pytest.raises(RunError, match="holds another recipe"):
        run("DS2", 0, folder, replace(TINY, training=replace(TINY.training, learning_rate=1.0)))
    with pytest.raises(RunError, match="at least a batch of 64 images"):
        run("DS2", 0, tmp_path / "large", replace(TINY, training=replace(TINY.training, batch=64)))
    result = json.loads((folder / "duplicated-0" / "result.json").read_text())
    assert set(result["split"]) == {"train", "test"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text(json.dumps({**result, "weights": {"full": "0"}}))
    (tmp_path / "b").mkdir()
    for changes, message in (
        ({"preset": {}}, "preset must be that of the other runs"),
        ({"weights": {"full": "1"}}, "weights 'full' must be those of the other runs, 0, got 1"),
        ({"images": {"test": {**result["images"]["test"], "names": []}}}, "its test images must be those"),
        ({"images": None}, "must be of this version"),
    ):
        other = {name: value for name, value in {**result, **changes}.items() if value is not None}
        (tmp_path / "b" / "result.json").write_text(json.dumps(other))
        with pytest.raises(RunError, match=message):
            read_runs(tmp_path)


@pytest.mark.train
def test_the_command_trains_counts_and_names_what_is_missing(written, tmp_path, monkeypatch, capsys):
    base = ["table2", "--preset", "tiny", "--data", str(written), "--out", str(tmp_path), "--device", "cpu", "--arms"]
    monkeypatch.setattr(sys, "argv", [*base, "DS4"])
    with pytest.raises(SystemExit, match=r"error: full must be given for DS4 \(--full\), got None"):
        main()
    monkeypatch.setattr(sys, "argv", [*base, "DS2", "--seeds", "3"])
    main()
    assert (tmp_path / "DS2-3" / "result.json").exists()
    monkeypatch.setattr(sys, "argv", [*base, "DS1", "DS7@9", "--counts"])
    main()
    text = capsys.readouterr().out
    assert "| test | 3 | 3 | 6 |" in text and "data must have at least" in text and "Not known from it" in text


# --- The table ---
@pytest.mark.train
def test_table_2_of_saved_runs(runs):
    folder = runs[1]
    figures = table2(folder)
    assert figures["images"] == {"normal": 3, "nodule": 3, "patients": 6} and set(figures["arms"]) == set(TINY.arms)
    pairs = {(row["arm"], row["reference"]) for row in figures["comparisons"]}
    assert pairs == {("DS4-graft", "DS2"), ("duplicated", "DS2"), ("DS4-graft", "duplicated")}
    text = "\n".join(table2_text(figures))
    assert "DS2 + duplicated real nodule images" in text
    assert "| DS4 | corrected | 0.6208 | 0.7930 | 0.4485 | 0.5898 |" in text
    with pytest.raises(RunError, match=r"must hold scores of val images, got \['test'\]"):
        table2(folder, "val")
    with pytest.raises(RunError, match="must hold finished runs"):
        table2(folder / "DS2-0")


def test_metrics_of_a_perfect_and_of_a_hopeless_classifier(monkeypatch):
    monkeypatch.setattr(table, "DRAWS", 50)
    labels, patients = torch.tensor([0, 0, 0, 0, 1, 1]), torch.arange(6)
    good = metrics({0: labels * 2.0 - 1, 1: labels * 4.0 - 2}, labels, patients)
    assert (good["auc"]["value"], good["accuracy"], good["sensitivity_at"]) == (1.0, 1.0, 1.0)
    bad = metrics({0: 1 - labels * 2.0}, labels, patients)
    assert (bad["auc"]["value"], bad["accuracy"], bad["precision"]) == (0.0, 0.0, 0.0)
    # Balanced: two of four normal images called a nodule weigh as one of two.
    half = metrics({0: torch.tensor([1.0, 1, -1, -1, 1, 1])}, labels, patients)
    assert half["precision"] == pytest.approx(2 / 3) and half["accuracy"] == pytest.approx(0.75)
    # No image is called a nodule in any seed: the precision is of nothing.
    none = metrics({seed: torch.full((6,), -1.0) for seed in (0, 1)}, labels, patients)
    assert math.isnan(none["precision"]) and none["specificity"] == 1.0


def test_comparisons_are_on_common_seeds_by_count_and_holm_is_within_a_reference(monkeypatch):
    monkeypatch.setattr(table, "DRAWS", 200)
    generator = torch.Generator().manual_seed(0)
    labels, patients = (torch.rand(60, generator=generator) < 0.4).long(), torch.arange(60)

    def scores(gain: float, *seeds: int) -> dict[int, torch.Tensor]:
        return {seed: torch.randn(60, generator=generator) + gain * labels for seed in seeds}

    arms = {"DS2": scores(0.3, 0, 1), "duplicated": scores(0.3, 0, 2), "DS4": scores(3.0, 0)}
    rows = {(row["arm"], row["reference"]): row for row in comparisons(arms, labels, patients)}
    assert set(rows) == {("DS4", "DS2"), ("duplicated", "DS2"), ("DS4", "duplicated")}
    gain = rows["DS4", "DS2"]
    assert gain["seeds"] == [0] and gain["difference"]["low"] > 0
    assert gain["p_holm"] == pytest.approx(2 * gain["p"])  # the smallest of two
    assert rows["DS4", "duplicated"]["p_holm"] == rows["DS4", "duplicated"]["p"]  # alone in its family
    # Of DS4@1 there are no duplicates of its count.
    arms = {name: scores(0.3, 0) for name in ("DS2", "duplicated@4", "DS4@4", "DS4@1")}
    pairs = {(row["arm"], row["reference"]) for row in comparisons(arms, labels, patients)}
    assert pairs == {(name, "DS2") for name in list(arms)[1:]} | {("DS4@4", "duplicated@4")}
