"""From films to weights in one command, inside a wall-clock budget: made for a GPU that is rented by the minute.

    python -m train.gpu_run --data FOLDER --ct-nodules FILE --out runs/gpu --minutes 25

Checks the machine with `tiny`, then trains encoders, classifier, prior, stage 1 and stage 2, and compares the stages'
best (METHOD 4 to 6). FOLDER/weights and FOLDER/contact_sheet.png hold the best so far at any moment, replaced whole:
the lowest KID on val while training goes on. The same command goes on after a cut: finished stages are kept, and the
budget is shared among the others. Needs no network. The films are read once a stage and stay decoded on the device.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from carim_aug.data.errors import DataError
from carim_aug.generators.pretrained import NoduleGenerator, WeightsError
from carim_aug.location.prior import LocationPrior
from train.classifier.densenet import ChestClassifier
from train.classifier.encoders import PRESETS as ENCODERS
from train.classifier.encoders import train_encoders
from train.classifier.training import train_classifier
from train.common.run import Run, RunError, TrainingError, folder_whole, write_whole
from train.gan.presets import CLASSIFIERS, PRESETS, changed
from train.gan.training import peak_memory, train_gan
from train.metrics.generator_quality import FigurePreset, matched_pairs, one_mask
from train.prior.fitting import fit_best

SHARES: dict[str, float] = {
    "check": 0.02,
    "encoders": 0.05,
    "classifier": 0.21,
    "prior": 0.03,
    "stage1": 0.43,
    "stage2": 0.20,
    "evaluation": 0.06,
}
"""Each stage's share of the budget; what one leaves over goes to the next ones."""

RECIPES: dict[str, tuple[str, str, str]] = {
    "fast256": ("fast256", "chexnet", "usual"),
    "fast128": ("fast128", "chexnet128", "usual"),
    "thesis256": ("thesis256", "chexnet", "usual"),
    "tiny": ("tiny", "tiny", "tiny"),
}
"""Presets of the GAN, the classifier and the encoders that go together."""

WORSE = 1.25
"""The final choice is among stages whose KID is at most so many times the lowest."""


class Budget:
    """Minutes shared among the stages that are left.

    Args:
        minutes: in all, from now.
        left: names of `SHARES`, in order.
    """

    def __init__(self, minutes: float, left: list[str]) -> None:
        """Starts the clock."""
        whole, share, self.ends = sum(SHARES[name] for name in left), 0.0, dict[str, float]()
        started = time.monotonic()
        for name in left:
            share += SHARES[name] / whole
            self.ends[name] = started + 60 * minutes * share

    def minutes(self, stage: str) -> float:
        """Gives the minutes until a stage should end, at least 0."""
        return max(self.ends[stage] - time.monotonic(), 0.0) / 60


class Published:
    """The weights that are the best so far, and their contact sheet, in one folder.

    Args:
        folder: of the whole run; report.json tells of what is there.
    """

    def __init__(self, folder: Path) -> None:
        """Reads what was published before."""
        self.folder, self.report = folder, folder / "report.json"
        self.facts: dict[str, Any] = {"stages": {}, "published": {}}
        if self.report.exists():
            self.facts = json.loads(self.report.read_text())

    def offer(self, weights: Path, best: dict[str, Any], *, stage: str, final: bool = False) -> None:
        """Takes weights if they are better than those there, or the final choice.

        Args:
            weights: exported, in the folder of their run.
            best: "kid" and "images" of them; empty where nothing was measured.
            stage: that they are of.
            final: take them anyway.
        """
        there = (self.folder / "weights").exists()
        before = self.facts["published"].get("kid", float("inf"))
        if not final and there and best.get("kid", float("inf")) >= before:
            return
        with folder_whole(self.folder, "weights") as part:
            shutil.copytree(weights, part, dirs_exist_ok=True)
        sheets = sorted(weights.parent.glob("samples-*.png"))
        named = weights.parent / f"samples-{best.get('images', 0):09d}.png"
        if sheets:
            write_whole(self.folder / "contact_sheet.png", (named if named in sheets else sheets[-1]).read_bytes())
        self.facts["published"] = {"stage": stage, **best}
        self.save()

    def save(self) -> None:
        """Writes report.json."""
        write_whole(self.report, json.dumps(self.facts, indent=2).encode())


def gpu_run(
    preset: str = "fast256",
    *,
    data: str | Path,
    ct_nodules: str | Path | None,
    out: str | Path,
    minutes: float = 25.0,
    seed: int = 0,
    device: str = "cpu",
    weights: str | Path | None = None,
    settings: tuple[str, ...] = (),
    compiled: bool = False,
    any_size: bool = False,
) -> Path:
    """Runs all stages that are not finished yet; gives the folder of the best weights.

    Args:
        preset: of `RECIPES`.
        data: ChestX-ray14's layout with train and val splits.
        ct_nodules: templates.npz, or None.
        out: of everything.
        minutes: wall clock.
        seed: of everything random.
        device: "cpu" or "cuda".
        weights: exported generator that stage 1 starts from.
        settings: numbers of the GAN's preset that differ, "name=value".
        compiled: torch.compile the networks.
        any_size: take films of several sizes, each squeezed to a square.

    Raises:
        RunError: something does not fit.
    """
    if preset not in RECIPES:
        raise RunError(f"preset must be one of {sorted(RECIPES)}, got {preset!r}")
    folder = Path(out)
    Run(folder, {"preset": preset, "seed": seed, "settings": list(settings), "weights": str(weights or "")})
    published = Published(folder)
    done = published.facts["stages"]
    gan, classes, encoders = RECIPES[preset]
    numbers = changed(PRESETS[gan], settings)
    second = replace(changed(PRESETS.get(f"{gan}-stage2", numbers), settings), images=2 * numbers.images)
    prior_file, classifier_file = folder / "prior.safetensors", folder / "classifier" / "classifier.safetensors"
    encoder = folder / "encoders" / "findings.safetensors"
    usual: dict[str, Any] = {"data": data, "ct_nodules": ct_nodules, "seed": seed, "device": device}
    usual |= {"any_size": any_size}
    budget = Budget(minutes, [name for name in SHARES if name not in done])

    def prior() -> LocationPrior:
        return LocationPrior.load(prior_file) if prior_file.exists() else LocationPrior.bundled()

    def check(left: float) -> dict[str, Any]:
        tiny = replace(PRESETS["tiny"], images=128, grow_at=(64,))
        started = time.monotonic()
        train_gan(tiny, out=folder / "check", limit=64, minutes=min(left, 1 / 3), **usual)
        rate = 128 / (time.monotonic() - started)
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        return {"device": name, "torch": torch.__version__, "images_per_s": round(rate, 1)}

    def learn_encoders(left: float) -> dict[str, Any]:
        train_encoders(ENCODERS[encoders], data=data, out=folder / "encoders", seed=seed, device=device)
        return json.loads((folder / "encoders" / "report.json").read_text())

    def learn_classifier(left: float) -> dict[str, Any]:
        train_classifier(CLASSIFIERS[classes], out=folder / "classifier", minutes=left, **usual)
        return json.loads((folder / "classifier" / "report.json").read_text())["val"]

    def learn_prior(left: float) -> dict[str, Any]:
        net = ChestClassifier.load(classifier_file).to(device) if classifier_file.exists() else None
        try:
            name, best = next(iter(fit_best(Path(data), net)[0].items()))
        except ValueError as error:  # too few boxes, say: the bundled prior will do
            return {"from": "bundled", "because": str(error)}
        aside = prior_file.with_suffix(".partial")
        best.save(aside)
        aside.replace(prior_file)
        return {"from": name}

    def stage(name: str, left: float, **options: Any) -> dict[str, Any]:
        def told(path: Path, best: dict[str, Any]) -> None:
            published.offer(path, best, stage=name)

        run = folder / name
        train_gan(
            numbers if name == "stage1" else second,
            out=run,
            minutes=left,
            prior=prior(),
            encoder=encoder,
            told=told,
            compiled=compiled,
            **usual,
            **options,
        )
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return {"last": lines[-1], "memory_mb": peak_memory(torch.device(device))}

    def second_stage(left: float) -> dict[str, Any]:
        if not classifier_file.exists():
            return {"skipped": "there is no classifier: its share of the budget was too short"}
        return stage("stage2", left, start=folder / "stage1", classifier=classifier_file)

    def evaluate(left: float) -> dict[str, Any]:
        figures, count = {}, FigurePreset(pairs=32 if preset == "tiny" else 400)
        for name in ("stage1", "stage2"):
            best = next((p for p in (folder / name / "best", folder / name / "export") if p.exists()), None)
            if best is None:
                continue
            pairs = matched_pairs(NoduleGenerator.from_pretrained(best).to(device), prior(), count)
            told = one_mask(pairs.differences, pairs.boxes)
            kid = _lowest_kid(folder / name / "log.jsonl")
            figures[name] = {"weights": best.name, **kid, **{k: told[k]["value"] for k in ("hit", "energy", "added")}}
        lowest = min(f.get("kid", 0.0) for f in figures.values())
        near = [name for name in figures if figures[name].get("kid", 0.0) <= max(WORSE * lowest, lowest)]
        chosen = max(near, key=lambda name: figures[name]["hit"] * figures[name]["energy"])
        facts = {k: figures[chosen][k] for k in ("kid", "images") if k in figures[chosen]}
        published.offer(folder / chosen / figures[chosen]["weights"], facts, stage=chosen, final=True)
        return {**figures, "chosen": chosen}

    stages: dict[str, Callable[[float], dict[str, Any]]] = {
        "check": check,
        "encoders": learn_encoders,
        "classifier": learn_classifier,
        "prior": learn_prior,
        "stage1": lambda left: stage("stage1", left, weights=weights),
        "stage2": second_stage,
        "evaluation": evaluate,
    }
    for name, do in stages.items():
        if name in done:
            continue
        started, left = time.monotonic(), budget.minutes(name)
        print(f"== {name}: {left:.1f} minutes", flush=True)
        try:
            facts = do(left)
        except TrainingError as error:
            if name != "classifier":
                raise
            facts = {"skipped": str(error)}
        if device == "cuda":
            torch.cuda.empty_cache()
        done[name] = {"seconds": round(time.monotonic() - started, 1), **facts}
        published.save()
    return folder / "weights"


def _lowest_kid(log: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    told = [{"kid": line["kid"], "images": line["images"]} for line in lines if "kid" in line]
    return min(told, key=lambda line: line["kid"], default={})


def main() -> None:
    """Runs everything from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fast256", help=f"one of {', '.join(sorted(RECIPES))}")
    parser.add_argument("--set", dest="settings", nargs="+", default=[], metavar="NAME=VALUE", help="the GAN's numbers")
    parser.add_argument("--data", required=True, help="a folder in ChestX-ray14's layout, with split.csv")
    parser.add_argument("--ct-nodules", help="templates.npz of CT nodules in projection")
    parser.add_argument("--out", required=True, help="folder of everything; the same folder resumes")
    parser.add_argument("--minutes", type=float, default=25.0, help="wall clock in all")
    parser.add_argument("--weights", help="stage 1 from an exported generator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", dest="compiled", action="store_true", help="torch.compile the networks")
    parser.add_argument("--any-size", action="store_true", help="take films of several sizes, each made a square")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = vars(parser.parse_args())
    options["settings"] = tuple(options["settings"])
    try:
        weights = gpu_run(options.pop("preset"), **options)
    except (RunError, TrainingError, DataError, WeightsError) as error:
        raise SystemExit(f"error: {error}") from error
    print((weights.parent / "report.json").read_text())
    print(f"weights: {weights}")


if __name__ == "__main__":
    main()
