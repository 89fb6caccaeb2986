"""What each switch of the GAN brings: `python -m train.gan.ablation --data FOLDER --out runs/ablation --arms r1_weight=1`.

The preset as it is and one arm for each change of its numbers, all from the same start with the same images, one after
the other; then the same figures of each. The same command resumes, and an arm that is done is not trained again. KID is
against films of val, patches are judged on the real boxes of the splits named, never by default on those of test.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from carim_aug.data.errors import DataError
from carim_aug.generators.checkpoint import WeightsError
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from train.common.cache import Kept, digest_of
from train.common.run import RunError, TrainingError
from train.gan.choice import Choice
from train.gan.presets import GANPreset, changed
from train.gan.start import named_preset
from train.gan.training import train_gan
from train.metrics.generator_quality import FigurePreset, matched_pairs, pair_figures
from train.reproduction.patches import HeldOut, PatchPreset, held_out_patches, learnt, prior_places, worth
from train.reproduction.report.tables import spanned, table
from train.reproduction.sources import graft_source, read_patients

BASE = "as it is"

JUDGED = FigurePreset(pairs=400, moved=100)


def folder_of(arm: str) -> str:
    """Gives the name of an arm's run: "r1_weight=1 grow_at=[1,2]" becomes "r1_weight-1_grow_at-1-2"."""
    if arm == BASE:
        return "base"
    return "".join(c if c.isalnum() or c in "._" else "_" if c == " " else "-" for c in arm).strip("-_")


def figures_of(folder: Path, kept: Kept, held_out: HeldOut, options: argparse.Namespace) -> dict[str, Any]:
    """Gives the figures of one arm's weights.

    Args:
        folder: of the exported generator.
        kept: figures on disk.
        held_out: real boxes and places that judge.
        options: data, encoders, patches, seeds and test of the command.
    """
    generator, prior = NoduleGenerator.from_pretrained(folder), LocationPrior.bundled()
    key = {"weights": generator.weights_hash}
    rows = {
        "pairs": kept.figure(
            "pairs", lambda: pair_figures(matched_pairs(generator, prior, JUDGED), JUDGED), preset=asdict(JUDGED), **key
        )
    }
    for file in options.encoders:

        def kid(file: str = file) -> dict[str, float]:
            return Choice(file, options.data, prior, seed=0).figures(generator)

        rows[f"kid {Path(file).stem}"] = kept.figure("kid", kid, encoder=digest_of([Path(file)]), **key)
    preset = PatchPreset(patches=options.patches, seeds=options.seeds)

    def patches() -> dict[str, Any]:
        train = read_patients(options.data, ["train"])
        return worth(learnt(train, prior_places(prior), graft_source(folder), preset, "grafts"), held_out)

    rows["patches"] = kept.figure("worth", patches, code="patches", preset=asdict(preset), test=options.test, **key)
    return rows


def ablation(preset: GANPreset, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Trains all arms, or goes on with them, and gives the figures of each by its name.

    Raises:
        RunError: no such number, or two arms that are one.
        TrainingError: losses are not finite, or nothing can be saved.
    """
    arms = {BASE: preset, **{arm: changed(preset, arm.split()) for arm in options.arms}}
    folders = {arm: Path(options.out) / folder_of(arm) for arm in arms}
    if len(set(folders.values())) < len(options.arms) + 1:
        raise RunError(f"arms must be different changes, got {options.arms}")
    how = {"data": options.data, "ct_nodules": options.ct_nodules, "seed": options.seed, "device": options.device}
    kept = Kept(Path(options.out) / "kept", {"data": Path(options.data).name})
    held_out = held_out_patches(read_patients(options.data, options.test), prior_places(LocationPrior.bundled()))
    figures = {}
    for arm, changed_preset in arms.items():
        weights = train_gan(changed_preset, out=folders[arm], weights=options.weights, **how)
        figures[arm] = figures_of(weights, kept, held_out, options)
        (Path(options.out) / "ablation.json").write_text(json.dumps(figures, indent=1))
        print(ablation_table({arm: figures[arm]}), flush=True)
    return figures


def ablation_table(figures: dict[str, dict[str, Any]]) -> str:
    """Gives the Markdown table of `ablation`'s figures."""
    kids = [name for name in next(iter(figures.values())) if name.startswith("kid ")]
    rows = []
    for arm, f in figures.items():
        pairs = f["pairs"]["prior"]
        patches = {"value": f["patches"]["auc"], "low": f["patches"]["low"], "high": f["patches"]["high"]}
        rows.append(
            [
                arm,
                spanned(patches),
                *(f"{f[name]['kid_normal']:.3f} / {f[name]['kid_nodule']:.3f}" for name in kids),
                *(spanned(pairs[name]) for name in ("energy", "hit", "lost", "added")),
                f"{pairs['roundness']['value']:.3f}",
            ]
        )
    names = "|".join(f"KID normal / nodule, {name.removeprefix('kid ')}" for name in kids)
    return table(f"arm|patch AUC|{names + '|' if names else ''}energy inside|hit|lost|contrast added|roundness", rows)


def parser() -> argparse.ArgumentParser:
    """Gives the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preset", default="fast128")
    made.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="numbers of all arms")
    made.add_argument("--arms", nargs="+", required=True, metavar='"NAME=VALUE ..."', help="one change or more each")
    made.add_argument("--images", type=int, default=8_000, help="real images shown to each arm")
    made.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with split.csv and boxes")
    made.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection")
    made.add_argument("--weights", help="an exported generator that all arms start from")
    made.add_argument("--encoders", nargs="*", default=[], help="files of train.classifier.encoders")
    made.add_argument("--test", nargs="+", default=["val"], help="splits of the real boxes that judge")
    made.add_argument("--patches", type=int, default=2_000, help="of each class, for the patch classifier")
    made.add_argument("--seeds", type=int, default=2, help="patch classifiers whose scores are averaged")
    made.add_argument("--out", required=True)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return made


def main() -> None:
    """Prints the table."""
    options = parser().parse_args()
    try:
        preset = replace(changed(named_preset(options.preset), options.set), images=options.images)
        print(ablation_table(ablation(preset, options)))
    except (RunError, TrainingError, DataError, WeightsError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
