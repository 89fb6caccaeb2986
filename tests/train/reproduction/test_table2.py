"""Table 2: the source's counts by patient, the arms, the runs, and the table made of them (METHOD 8 and 9)."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from carim_aug.data.phantom import phantom_chest
from carim_aug.generators.checkpoint import BUNDLED
from train.common.run import RunError
from train.common.splits import FilmSet, counted, read_filmset, source_split, write_split
from train.reproduction.report.published import TABLE1, TABLE2, corrected_table1, corrected_table2
from train.reproduction.table2.arms import ARMS, SHARE, Sources, arm_batches, arm_counts, parsed, real_films
from train.reproduction.table2.start import PRESETS as STARTS
from train.reproduction.table2.start import train_neutral
from train.reproduction.table2.table import comparisons, metrics, read_runs, table2, table2_text
from train.reproduction.table2.training import PRESETS, SWEPT, possible, read_parts, run_arm, told_counts

ROOT = Path(__file__).resolve().parents[3]
TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """ChestX-ray14's official layout with small drawn films: twelve image folders, its lists, no split of ours."""
    root = tmp_path_factory.mktemp("official")
    rng, rows, boxes = np.random.default_rng(0), [], []
    head = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    head += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    for patient in range(1, 81):
        for follow in range(int(rng.integers(1, 4))):
            name = f"{patient:08d}_{follow:03d}.png"
            label = (
                ("Nodule", "Nodule|Effusion", "Effusion")[int(rng.integers(3))] if patient % 4 == 0 else "No Finding"
            )
            folder = root / f"images_{patient % 12 + 1:03d}" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            box = (20, 24, 29, 33) if "Nodule" in label else None
            image = phantom_chest(64, nodule_box=box, seed=patient * 10 + follow)
            Image.fromarray((image[0].numpy() * 255).astype(np.uint8)).save(folder / name)
            rows.append([name, label, follow, patient, 50, "M", "PA", 1024, 1024, 0.14, 0.14])
            if box is not None and patient % 8 == 0:
                boxes.append([name, "Nodule", 320, 384, 144, 144, "", "", ""])
    for name, header, lines in (
        ("Data_Entry_2017_v2020.csv", head, rows),
        ("BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,", boxes),
    ):
        with (root / name).open("w", newline="") as file:
            file.write(header + "\n")
            csv.writer(file).writerows(lines)
    held = {row[0] for row in rows if row[3] % 5 == 0}
    (root / "test_list.txt").write_text("\n".join(sorted(held)))
    (root / "train_val_list.txt").write_text("\n".join(row[0] for row in rows if row[0] not in held))
    return root


@pytest.fixture(scope="module")
def written(official, tmp_path_factory):
    """The same with the split that keeps the source's test films from all recipes."""
    root = tmp_path_factory.mktemp("written")
    for path in official.iterdir():
        (root / path.name).symlink_to(path)
    write_split(root, test=6)
    return root


@pytest.fixture(scope="module")
def trained(written, templates, tmp_path_factory):
    """Two arms and two seeds of the tiny preset on the official layout, from a start of its own."""
    out = tmp_path_factory.mktemp("table2")
    preset = replace(TINY, split="source", test=6)
    start = train_neutral(STARTS["tiny"], data=written, out=out / "start", split="source", test=6)
    parts = read_parts(written, preset)
    sources = Sources(BUNDLED, BUNDLED, templates)
    for seed in range(2):
        for name in TINY.arms:
            run_arm(name, parts, sources, preset, start=start, out=out / "runs", seed=seed)
    return out, preset, parts, sources, start


def many_patients(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """As many normal and nodule films as the full data set has, of patients with many films or few."""
    rng = np.random.default_rng(seed)
    targets = np.concatenate([np.zeros(60_361, dtype=int), np.ones(6_331, dtype=int)])
    # Patients of nodule films have some three of them, and normal ones too.
    patients = np.concatenate([rng.integers(0, 26_000, 60_361), rng.integers(24_000, 26_500, 6_331)])
    return targets, patients


@pytest.mark.parametrize("seed", range(3))
def test_the_sources_counts_come_out_to_the_film_and_no_patient_is_on_both_sides(seed):
    targets, patients = many_patients()
    split = np.array(source_split(targets, patients, seed=seed))
    for part, normal, nodule in (("test", 633, 633), ("train", 59_728, 5_698)):
        assert (int((targets[split == part] == 0).sum()), int(targets[split == part].sum())) == (normal, nodule)
    assert not set(patients[split == "test"]) & set(patients[split == "train"])


def test_another_seed_gives_another_split():
    targets, patients = many_patients()
    assert source_split(targets, patients, seed=0) != source_split(targets, patients, seed=1)


def test_counts_that_whole_patients_cannot_meet_are_refused():
    with pytest.raises(
        RunError, match=r"test must be met by whole patients, got 2 films of each class of 3 normal and 3"
    ):
        source_split(np.array([0, 0, 0, 1, 1, 1]), np.array([1, 1, 1, 2, 2, 2]), test=2)


def test_the_official_layout_is_read_by_the_sources_split(official, written):
    with pytest.raises(RunError, match="write split.csv first"):  # else generators would learn from test films
        read_filmset(official, "test", 32, split="source", test=6)
    train, test = (read_filmset(written, part, 32, split="source", test=6) for part in ("train", "test"))
    assert (len(test), sum(test.targets)) == (12, 6)
    assert not set(test.patients.tolist()) & set(train.patients.tolist())
    everything = read_filmset(written, "train", 32, split="source", test=6, everything=True)
    assert len(everything) > len(train)
    assert not set(test.patients.tolist()) & set(everything.patients.tolist())


def test_the_folders_own_split_holds_normal_and_nodule_films_only(phantom_data):
    films = read_filmset(phantom_data, "train", 32)
    assert isinstance(films, FilmSet)
    assert (len(films), sum(films.targets), films.images.shape[1:]) == (24, 8, (1, 32, 32))
    assert any(len(boxes) for boxes in films.boxes)
    with pytest.raises(RunError, match="the test split needs normal and nodule films, got 0 and 0"):
        read_filmset(phantom_data, "test", 32)
    with pytest.raises(RunError, match="split must be 'file' or 'source', got 'mine'"):
        read_filmset(phantom_data, "train", 32, split="mine")


@pytest.mark.parametrize("name", [*ARMS, *SWEPT])
def test_every_arm_holds_what_it_says_and_stays_balanced(name, phantom_data, templates):
    train = read_filmset(phantom_data, "train", 32)
    if name.endswith("@4"):  # there are too few normal films in the phantom for so many
        name = name.removesuffix("4") + "0.5"
    epochs, counts = arm_batches(name, train, Sources(BUNDLED, BUNDLED, templates), batch=4, seed=1)
    arm, share = parsed(name)
    n = round(share * 8)
    assert share == pytest.approx(SHARE if arm.source and "@" not in name else share)
    assert counts["Nodule"] == {"real": 8, "synthetic": n, "total": 8 + n}
    names = (("No Finding", "real"), ("Nodule", "real"), ("No Finding", "synthetic"), ("Nodule", "synthetic"))
    assert arm_counts(name, 16, 8) == counts_of(*(counts[c][kind] for c, kind in names))
    assert counts["No Finding"]["total"] == (16 if name == "DS1" else 8 + n)
    batches = list(epochs(0))
    shown = sum(len(images) for images, _ in batches)
    assert shown == (counts["Nodule"]["total"] + counts["No Finding"]["total"]) // 4 * 4
    again = list(epochs(0))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, again, strict=True))


def test_duplicates_are_the_train_splits_own_nodule_films(phantom_data):
    train = read_filmset(phantom_data, "train", 32)
    epochs, _ = arm_batches("DS5@1", train, Sources(), batch=32, seed=0)
    ((images, labels),) = list(epochs(0))
    real = train.images[torch.tensor(train.targets) == 1].flatten(1)
    shown = images[labels == 1].flatten(1)
    assert len(shown) == 16
    assert all(bool((film == real).all(dim=1).any()) for film in shown)


def test_normal_films_are_drawn_by_the_seed(phantom_data):
    train, arm = read_filmset(phantom_data, "train", 32), ARMS["DS2"]
    names = [set(real_films(arm, train, 8, seed=s).names) for s in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    with pytest.raises(RunError, match="data must have at least 40 normal films to train on for DS7@4, got 16"):
        arm_batches("DS7@4", train, Sources(), batch=4, seed=0)


@pytest.mark.parametrize("name", ["DS0", "DS4@", "DS4@-1", "DS4@nan", "DS4@inf", "DS4@many", "DS2@1"])
def test_unknown_arms_are_refused(name):
    with pytest.raises(RunError, match="arms must be of"):
        parsed(name)


def test_what_an_arm_needs_is_asked_for_by_name(phantom_data):
    train = read_filmset(phantom_data, "train", 32)
    for name, needed in (("DS3", "without"), ("DS4", "full"), ("DS8", "ct_nodules")):
        with pytest.raises(RunError, match=f"{needed} must be given for"):
            arm_batches(name, train, Sources(), batch=4, seed=0)


def test_arms_of_a_preset_that_lack_something_are_left_out_and_said(capsys):
    assert possible(["DS2", "DS8", "DS5"], Sources(), asked=False) == ["DS2", "DS5"]
    assert "DS8 is left out, for --ct-nodules was not given" in capsys.readouterr().out
    with pytest.raises(RunError, match="ct_nodules must be given for DS8"):
        possible(["DS2", "DS8"], Sources(), asked=True)


def test_runs_repeat_themselves_to_the_last_digit_and_other_seeds_differ(trained, tmp_path):
    out, preset, parts, sources, start = trained
    kept = read_runs(out / "runs")
    again = run_arm("DS4-graft", parts, sources, preset, start=start, out=tmp_path, seed=0)
    assert again["films"] == kept["DS4-graft"][0]["films"]
    assert again["films"]["test"]["logits"] != kept["DS4-graft"][1]["films"]["test"]["logits"]
    assert len(again["weights"]["full"]) == len(again["start"]) == 64


def test_a_cut_run_ends_as_if_it_had_not_been_cut(trained, tmp_path, monkeypatch):
    out, preset, parts, sources, start = trained
    import train.classifier.finetune as module

    steps = []
    real = module.get_total_norm

    def cut(slopes):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(slopes)

    monkeypatch.setattr(module, "get_total_norm", cut)
    with pytest.raises(KeyboardInterrupt):
        run_arm("DS5", parts, sources, preset, start=start, out=tmp_path, seed=1)
    monkeypatch.setattr(module, "get_total_norm", real)
    told = run_arm("DS5", parts, sources, preset, start=start, out=tmp_path, seed=1)
    assert told["films"] == read_runs(out / "runs")["DS5"][1]["films"]


def test_a_run_of_other_settings_is_refused(trained, tmp_path):
    out, preset, parts, sources, start = trained
    other = replace(preset, training=replace(preset.training, learning_rate=1.0))
    with pytest.raises(RunError, match="holds another recipe"):
        run_arm("DS2", parts, sources, other, start=start, out=out / "runs", seed=0)
    run_arm("DS2", parts, sources, other, start=start, out=tmp_path / "runs", seed=0)
    told = json.loads((out / "runs" / "DS5-0" / "result.json").read_text())
    assert set(told["split_films"]) == {"train", "test"}
    (tmp_path / "runs" / "DS5-0").mkdir()
    (tmp_path / "runs" / "DS5-0" / "result.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match="preset must be that of the other runs"):
        read_runs(tmp_path / "runs")


def test_table_2_of_saved_runs(trained):
    figures = table2(trained[0] / "runs")
    assert figures["films"] == {"normal": 6, "nodule": 6, "patients": figures["films"]["patients"]}
    assert set(figures["arms"]) == set(TINY.arms)
    pairs = {(row["arm"], row["reference"]) for row in figures["comparisons"]}
    assert pairs == {("DS4-graft", "DS2"), ("DS5", "DS2"), ("DS4-graft", "DS5")}
    text = "\n".join(table2_text(figures))
    assert "DS2 + duplicated real nodule films" in text
    assert "| DS4 | corrected | 0.6208 | 0.7930 | 0.4485 | 0.5898 |" in text
    with pytest.raises(RunError, match=r"must hold scores of val films, got \['test'\]"):
        table2(trained[0] / "runs", "val")
    with pytest.raises(RunError, match="must hold finished runs"):
        table2(trained[0] / "start")


def test_metrics_of_a_perfect_and_of_a_hopeless_classifier():
    labels, patients = torch.tensor([0, 0, 0, 0, 1, 1]), torch.arange(6)
    good = metrics({0: labels * 2.0 - 1, 1: labels * 4.0 - 2}, labels, patients)
    assert (good["auc"]["value"], good["accuracy"], good["sensitivity_at"]) == (1.0, 1.0, 1.0)
    bad = metrics({0: 1 - labels * 2.0}, labels, patients)
    assert (bad["auc"]["value"], bad["accuracy"], bad["precision"]) == (0.0, 0.0, 0.0)
    # Balanced: two of four normal films called a nodule weigh as one of two.
    half = metrics({0: torch.tensor([1.0, 1, -1, -1, 1, 1])}, labels, patients)
    assert half["precision"] == pytest.approx(2 / 3)
    assert half["accuracy"] == pytest.approx(0.75)


def test_swept_arms_are_set_against_duplicates_of_their_own_count():
    labels, patients = torch.tensor([0, 1] * 10), torch.arange(20)
    stream = torch.Generator().manual_seed(0)
    arms = {name: {0: torch.randn(20, generator=stream)} for name in ("DS2", "DS5", "DS5@4", "DS4@4", "DS4@1")}
    pairs = {(row["arm"], row["reference"]) for row in comparisons(arms, labels, patients)}
    assert pairs == {
        ("DS5", "DS2"),
        ("DS5@4", "DS2"),
        ("DS4@4", "DS2"),
        ("DS4@1", "DS2"),
        ("DS4@4", "DS5@4"),  # DS4@1 has no run of duplicates of its count
    }


def test_rates_that_no_seed_defines_are_left_open():
    labels, patients = torch.tensor([0, 0, 1, 1]), torch.arange(4)
    told = metrics({0: torch.full((4,), -1.0), 1: torch.full((4,), -2.0)}, labels, patients)
    assert math.isnan(told["precision"]) and told["specificity"] == 1.0


def test_a_data_set_smaller_than_a_batch_is_refused(phantom_data, tmp_path):
    parts = {part: read_filmset(phantom_data, part, 32) for part in ("train", "val")}
    preset = replace(TINY, training=replace(TINY.training, batch=64))
    with pytest.raises(RunError, match="data must hold at least a batch of 64 films"):
        run_arm("DS2", parts, Sources(), preset, start=None, out=tmp_path, seed=0)


def test_comparisons_are_on_common_seeds_and_holm_is_within_a_reference():
    stream = torch.Generator().manual_seed(0)
    labels, patients = (torch.rand(60, generator=stream) < 0.4).long(), torch.arange(60)

    def scores(gain: float) -> torch.Tensor:
        return torch.randn(60, generator=stream) + gain * labels

    arms = {"DS2": {0: scores(0.3), 1: scores(0.3)}, "DS5": {0: scores(0.3), 2: scores(0.3)}, "DS4": {0: scores(3.0)}}
    told = {(row["arm"], row["reference"]): row for row in comparisons(arms, labels, patients)}
    assert set(told) == {("DS4", "DS2"), ("DS5", "DS2"), ("DS4", "DS5")}
    assert told["DS4", "DS2"]["seeds"] == [0]
    assert told["DS4", "DS2"]["difference"]["low"] > 0
    assert told["DS4", "DS2"]["p_holm"] == pytest.approx(2 * told["DS4", "DS2"]["p"])  # the smallest of two
    assert told["DS4", "DS5"]["p_holm"] == told["DS4", "DS5"]["p"]  # alone in its family


def test_the_sources_tables_are_those_of_the_method():
    assert TABLE1["carim"] == (55.29, 53.13, 67.52, 66.45)
    assert corrected_table1()["carim"] == pytest.approx((19.39, 18.32), abs=0.01)
    for row in TABLE2.values():
        assert set(row) == {"accuracy", "sensitivity", "specificity", "precision", "f1", "auc"}
    assert set(corrected_table2()) == {"DS2", "DS3", "DS4"}
    for name, row in corrected_table2().items():  # F1 does not change when precision and recall change places
        assert row["f1"] == pytest.approx(TABLE2[name]["f1"], abs=2e-4)
    assert corrected_table2()["DS2"]["specificity"] == pytest.approx(0.4407, abs=2e-4)


def test_counts_come_from_the_tables_alone(official, written, tmp_path):
    table = "Data_Entry_2017_v2020.csv"
    (tmp_path / table).write_bytes((official / table).read_bytes())
    parts = counted(tmp_path, split="source", test=6)
    assert (parts["test"]["normal"], parts["test"]["nodule"]) == (6, 6)
    train = read_filmset(written, "train", 32, split="source", test=6)
    assert parts["train"]["nodule"] == sum(train.targets)
    assert parts["train"]["normal"] + parts["train"]["nodule"] == len(train)
    text = told_counts(parts, ["DS1", "DS4@4", "DS7@4"])
    assert "| test | 6 | 6 |" in text
    assert "59,728 normal and 5,698 nodule" in text
    assert "Not known" in text


def test_the_written_split_keeps_the_test_films_from_every_recipe(official, written):
    parts = {part: read_filmset(written, part, 32, everything=True) for part in ("train", "test")}
    held = read_filmset(written, "test", 32, split="source", test=6)
    assert set(held.names) <= set(parts["test"].names)
    assert set(parts["test"].patients.tolist()) == set(held.patients.tolist())
    counts = counted(written)
    assert (counts["test"]["normal"], counts["test"]["nodule"]) == (6, 6)
    together = counted(official, split="source", test=6)["train"]
    assert counts["train"]["nodule"] + counts.get("val", {"nodule": 0})["nodule"] == together["nodule"]
    with pytest.raises(RunError, match=r"split.csv is there already"):
        write_split(written, test=6)


def test_the_sources_data_sets_have_the_sources_counts():
    assert arm_counts("DS1", 59_728, 5_698) == counts_of(59_728, 5_698, 0, 0)
    assert arm_counts("DS2", 59_728, 5_698) == counts_of(5_698, 5_698, 0, 0)
    assert arm_counts("DS4", 59_728, 5_698) == counts_of(5_698, 5_698, 2_000, 2_000)
    assert arm_counts("DS5", 59_728, 5_698) == counts_of(7_698, 5_698, 0, 2_000)


def counts_of(*numbers: int) -> dict[str, int]:
    return dict(zip(("real normal", "real nodule", "synthetic normal", "synthetic nodule"), numbers, strict=True))


def test_the_command_runs_the_official_layout_and_names_what_is_missing(official, tmp_path):
    base = [sys.executable, "-m", "train.reproduction.table2", "--preset", "tiny", "--data", str(official)]
    done = subprocess.run([*base, "--arms", "DS4", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: full must be given for DS4 (--full), got None" in done.stderr
    done = subprocess.run(
        [*base, "--arms", "DS2", "--seeds", "3", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "DS2-3" / "result.json").exists()
