"""From images to weights in one command, inside a wall-clock budget: made for a GPU that is rented by the minute.

    python -m train.gpu_run --data FOLDER --ct-nodules FILE --out runs/gpu --minutes 25

Checks the machine with `tiny`, then trains encoders, classifier, prior, stage 1 and stage 2, and compares the stages'
best. FOLDER/weights and FOLDER/contact_sheet.png hold the best so far at any moment, replaced whole: the lowest KID on
val while training goes on. The same command goes on after a cut: finished stages stay, and the budget is shared among
the others. Needs no network. The images are read once a stage and stay decoded on the device.
"""

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.location.prior import LocationPrior
from train.classifier.densenet import ChestClassifier
from train.classifier.encoders import PRESETS as ENCODERS
from train.classifier.encoders import train_encoders
from train.classifier.presets import PRESETS as CLASSIFIERS
from train.classifier.training import train_classifier
from train.common.command import named_errors, recipe_parser
from train.common.distributed import peak_memory
from train.common.presets import find_preset, override
from train.common.run import Run, TrainingError, folder_whole, write_whole
from train.gan.presets import PRESETS, GANPreset
from train.gan.training import train_gan
from train.metrics.generator_quality import FigurePreset, matched_pairs, one_mask
from train.prior.fitting import fit_best

# Each stage's share of the budget; what one leaves over goes to the next ones. `GPURun` has a method of each name.
SHARES = {"check": 0.02, "encoders": 0.05, "classifier": 0.21, "prior": 0.03}
SHARES |= {"stage1": 0.43, "stage2": 0.20, "evaluation": 0.06}

# Presets of the GAN, the classifier and the encoders that go together.
RECIPES: dict[str, tuple[str, str, str]] = {
    "fast256": ("fast256", "chexnet", "usual"),
    "fast128": ("fast128", "chexnet128", "usual"),
    "thesis256": ("thesis256", "chexnet", "usual"),
    "tiny": ("tiny", "tiny", "tiny"),
}
WORSE = 1.25  # the final choice is among stages whose KID is at most so many times the lowest


def share_out(minutes: float, left: list[str]) -> dict[str, float]:
    """Return when each stage that is left, in order, should end, in seconds of the monotonic clock."""
    whole, now = sum(SHARES[name] for name in left), time.monotonic()
    ends = accumulate(SHARES[name] / whole for name in left)
    return {name: now + 60 * minutes * end for name, end in zip(left, ends, strict=True)}


class Published:
    """The weights that are the best so far, and their contact sheet, in the folder of the whole run.

    Its report.json says what is there, and what the finished stages found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.report = folder, folder / "report.json"
        self.facts: dict[str, Any] = {"stages": {}, "published": {}}
        if self.report.exists():
            self.facts = json.loads(self.report.read_text())

    def offer(self, weights: Path, figures: dict[str, Any], *, stage: str, final: bool = False) -> None:
        """Take a stage's weights, in the folder of their run, if they are better than those there, or the final choice.

        Figures are their "kid" and "images"; empty where nothing was measured.
        """
        before = self.facts["published"].get("kid", math.inf)
        if not final and (self.folder / "weights").exists() and figures.get("kid", math.inf) >= before:
            return
        with folder_whole(self.folder, "weights") as part:
            shutil.copytree(weights, part, dirs_exist_ok=True)
        named = weights.parent / f"samples-{figures.get('images', 0):09d}.png"
        if sheets := sorted(weights.parent.glob("samples-*.png")):
            write_whole(self.folder / "contact_sheet.png", (named if named in sheets else sheets[-1]).read_bytes())
        self.facts["published"] = {"stage": stage, **figures}
        self.save()

    def save(self) -> None:
        """Write report.json."""
        write_whole(self.report, json.dumps(self.facts, indent=2).encode())


@dataclass
class GPURun:
    """The command: a method for each stage of `SHARES`, which takes its minutes and returns what report.json gains."""

    preset: str  # of `RECIPES`
    data: str | Path  # ChestX-ray14's layout with train and val splits
    ct_nodules: str | Path | None  # templates.npz, or None
    out: str | Path  # folder of everything
    minutes: float = 25.0  # wall clock in all
    seed: int = 0  # of everything random
    device: str = "cpu"  # "cpu" or "cuda"
    weights: str | Path | None = None  # exported generator that stage 1 starts from, or None
    settings: Sequence[str] = ()  # numbers of the GAN's preset that differ, "name=value"
    compiled: bool = False  # torch.compile the networks
    any_size: bool = False  # take images of several sizes, each squeezed to a square

    def __post_init__(self) -> None:
        gan, self.classifiers, self.encoder_preset = find_preset(RECIPES, self.preset)
        self.first = override(PRESETS[gan], self.settings)
        second = override(PRESETS.get(f"{gan}-stage2", self.first), self.settings)
        self.second = replace(second, images=2 * self.first.images)
        self.folder = Path(self.out)
        self.classifier_file = self.folder / "classifier" / "classifier.safetensors"
        self.prior_file = self.folder / "prior.safetensors"
        self.options: dict[str, Any] = {"data": self.data, "ct_nodules": self.ct_nodules, "seed": self.seed}
        self.options |= {"device": self.device, "any_size": self.any_size}
        recipe = {"preset": self.preset, "seed": self.seed, "settings": list(self.settings)}
        Run(self.folder, recipe | {"weights": str(self.weights or "")})
        self.published = Published(self.folder)

    def run(self) -> Path:
        """Run all stages that are not finished yet; return the folder of the best weights."""
        done = self.published.facts["stages"]
        left = [name for name in SHARES if name not in done]
        for name, end in share_out(self.minutes, left).items():
            started = time.monotonic()
            share = max(end - started, 0.0) / 60
            print(f"== {name}: {share:.1f} minutes", flush=True)
            facts = getattr(self, name)(share)
            if self.device == "cuda":
                torch.cuda.empty_cache()
            done[name] = {"seconds": round(time.monotonic() - started, 1), **facts}
            self.published.save()
        return self.folder / "weights"

    def check(self, minutes: float) -> dict[str, Any]:
        """Train `tiny` for a moment: does everything work here, and how fast is it?"""
        tiny, started = replace(PRESETS["tiny"], images=128, grow_at=(64,)), time.monotonic()
        train_gan(tiny, out=self.folder / "check", limit=64, minutes=min(minutes, 1 / 3), **self.options)
        rate = 128 / (time.monotonic() - started)
        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        return {"device": name, "torch": torch.__version__, "images_per_s": round(rate, 1)}

    def encoders(self, minutes: float) -> dict[str, Any]:
        """Train what KID is measured by."""
        out, preset = self.folder / "encoders", ENCODERS[self.encoder_preset]
        options = {name: self.options[name] for name in ("data", "seed", "device", "any_size")}
        train_encoders(preset, out=out, **options)
        return json.loads((out / "report.json").read_text())

    def classifier(self, minutes: float) -> dict[str, Any]:
        """Train the classifier of the CARIM loss; without one, stage 2 is left out."""
        out = self.classifier_file.parent
        try:
            train_classifier(CLASSIFIERS[self.classifiers], out=out, minutes=minutes, **self.options)
        except TrainingError as error:
            return {"skipped": str(error)}
        return json.loads((out / "report.json").read_text())["val"]

    def prior(self, minutes: float) -> dict[str, Any]:
        """Fit the location prior; the bundled one will do where there are too few boxes."""
        file = self.classifier_file
        classifier = ChestClassifier.load(file).to(self.device) if file.exists() else None
        try:
            name, best = next(iter(fit_best(Path(self.data), classifier)[0].items()))
        except ValueError as error:
            return {"from": "bundled", "because": str(error)}
        aside = self.prior_file.with_suffix(".partial")
        best.save(aside)
        aside.replace(self.prior_file)
        return {"from": name}

    def stage1(self, minutes: float) -> dict[str, Any]:
        """Train without the CARIM loss."""
        return self._train("stage1", self.first, minutes, weights=self.weights)

    def stage2(self, minutes: float) -> dict[str, Any]:
        """Go on with the CARIM loss."""
        if not self.classifier_file.exists():
            return {"skipped": "there is no classifier: its share of the budget was too short"}
        start = {"start": self.folder / "stage1", "classifier": self.classifier_file}
        return self._train("stage2", self.second, minutes, **start)

    def evaluation(self, minutes: float) -> dict[str, Any]:
        """Choose among the stages' best: of those of about the lowest KID, the one whose nodules lie best."""
        figures, preset = {}, FigurePreset(pairs=32 if self.preset == "tiny" else 400)
        for name in ("stage1", "stage2"):
            folders = [self.folder / name / part for part in ("best", "export")]
            weights = next((folder for folder in folders if folder.exists()), None)
            if weights is None:
                continue
            source: Any = NoduleGenerator.from_pretrained(weights)
            pairs = matched_pairs(source, self._prior(), preset, device=self.device)
            placed = one_mask(pairs.differences, pairs.boxes)
            values = {key: placed[key]["value"] for key in ("hit", "energy", "added")}
            figures[name] = {"weights": weights.name, **_lowest_kid(self.folder / name / "log.jsonl"), **values}
        lowest = min(f.get("kid", 0.0) for f in figures.values())
        near = [name for name in figures if figures[name].get("kid", 0.0) <= max(WORSE * lowest, lowest)]
        chosen = max(near, key=lambda name: figures[name]["hit"] * figures[name]["energy"])
        facts: dict[str, Any] = {key: figures[chosen][key] for key in ("kid", "images") if key in figures[chosen]}
        self.published.offer(self.folder / chosen / figures[chosen]["weights"], facts, stage=chosen, final=True)
        return {**figures, "chosen": chosen}

    def _train(self, name: str, preset: GANPreset, minutes: float, **start: Any) -> dict[str, Any]:
        options: dict[str, Any] = {**self.options, **start, "compiled": self.compiled, "prior": self._prior()}
        options |= {"encoder": self.folder / "encoders" / "findings.safetensors"}
        options |= {"on_snapshot": partial(self.published.offer, stage=name)}
        train_gan(preset, out=self.folder / name, minutes=minutes, **options)
        lines = (self.folder / name / "log.jsonl").read_text().splitlines()
        return {"last": json.loads(lines[-1]), "memory_mb": peak_memory()}

    def _prior(self) -> LocationPrior:
        return LocationPrior.load(self.prior_file) if self.prior_file.exists() else LocationPrior.bundled()


def _lowest_kid(log: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    measured = [{"kid": line["kid"], "images": line["images"]} for line in lines if "kid" in line]
    return min(measured, key=lambda line: line["kid"], default={})


def main() -> None:
    """Run everything from the command line."""
    names = ("--preset", "--set", "--data", "--ct-nodules", "--out", "--minutes", "--seed", "--compile", "--any-size")
    changes: dict[str, Any] = {"preset": {"default": "fast256", "help": f"one of {', '.join(RECIPES)}"}}
    changes |= {"set": {"dest": "settings", "help": "the GAN's numbers"}}
    changes |= {"minutes": {"default": 25.0, "help": "wall clock in all"}}
    parser = recipe_parser(__doc__, *names, "--device", **changes)
    parser.add_argument("--weights", help="stage 1 from an exported generator")
    with named_errors():
        weights = GPURun(**vars(parser.parse_args())).run()
    print((weights.parent / "report.json").read_text())
    print(f"weights: {weights}")


if __name__ == "__main__":
    main()
