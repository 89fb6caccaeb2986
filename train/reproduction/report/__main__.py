"""All figures: `python -m train.reproduction.report --data FOLDER --weights A [B ..] --encoders FOLDER`.

With `--table1` (folder of `train.reproduction.baselines`) and `--table2` (of `train.reproduction.table2`) also every
table and figure of Ann (2021), beside the printed ones, and their tables as CSV; `--sections reproduction` gives these
alone. Writes figures.json, report.md (the tables that docs/results.md quotes) and report.html (with pictures: they hold
real X-rays, so keep them where the data are). A figure that was computed once stays in OUT/figures under the hash of
its weights, settings and code, and is read back the next time. Weights given first and second are stage 1 and stage 2,
if they are.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.common.command import named_errors, recipe_parser
from train.common.run import git_commit
from train.reproduction.report import ann, learning, speed, weights
from train.reproduction.report.context import PRESETS, Report
from train.reproduction.report.html import page, write_csvs

SECTIONS = {"weights": weights, "patches": learning, "speed": speed, "reproduction": ann}


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Compute what is missing, write figures.json, report.md, report.html and tables as CSV, and return the figures."""
    started, out, this = time.monotonic(), Path(options.out), Report(options)
    found: dict[str, Any] = {"test": options.test, "git_commit": git_commit(), "preset": asdict(this.preset)}
    found["encoders"] = json.loads((Path(options.encoders) / "report.json").read_text())
    blocks: list[str] = []
    for name, section in SECTIONS.items():
        if name in options.sections:
            found[name] = section.measure(this)
            blocks += section.text(found)
    text = "\n\n".join(["# Figures", introduction(found), *blocks]) + "\n"
    (out / "figures.json").write_text(json.dumps(found, indent=1))
    (out / "report.md").write_text(text)
    (out / "report.html").write_text(page(text, this.pictures))
    write_csvs(this.tables, out)
    print(f"{this.cache.computed} figures computed in {math.ceil(time.monotonic() - started)} s: {out / 'report.md'}")
    return found


def introduction(found: Mapping[str, Any]) -> str:
    """Return what the figures are of."""
    text = f"Held-out images: {', '.join(found['test'])}. Intervals are 95 %; [[..]] are quartiles. "
    if "weights" in found:
        names = []
        for name, one in found["weights"].items():
            stage, seen = one["recipe"]["stage"], one["recipe"]["images_seen"]
            names.append(f"{name} {one['hash'][:12]}, " + (f"stage {stage}, {seen:,} images" if stage else "no recipe"))
        text += f"Weights: {'; '.join(names)}. "
    return f"{text}Commit {found['git_commit'][:12]}."


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    changes: dict[str, dict[str, Any]] = {
        "preset": {"choices": sorted(PRESETS), "default": "usual"},
        "data": {"help": "a folder in ChestX-ray14's layout, with splits and boxes"},
        "out": {"required": False, "default": "runs/report"},
        "device": {"help": "of the timings"},
    }
    parser = recipe_parser(__doc__, "--preset", "--data", "--ct-nodules", "--out", "--device", **changes)
    parser.add_argument("--weights", nargs="+", default=[""], help="folders of generators; '' is the bundled one")
    parser.add_argument("--classifier", help="file of the classifier whose maps are looked at")
    parser.add_argument("--table1", help="folder of train.reproduction.baselines: Table 1 and Figures 3 to 7")
    parser.add_argument("--figures-of", default="carim", help="model of Figures 4 to 7, by its name in Table 1")
    parser.add_argument("--maps", type=int, help="nodule images of Figure 7, in place of the 2,000 of Ann (2021)")
    parser.add_argument("--table2", help="folder of train.reproduction.table2: Table 2")
    parser.add_argument("--table2-part", default="test", choices=("val", "test"), help="images of Table 2")
    classifiers = "classifiers of Figure 7: that of the CARIM loss, and others that training never saw"
    parser.add_argument("--classifiers", nargs="+", default=[], metavar="NAME=FILE", help=classifiers)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--encoders", required=True, help="folder that train.classifier.encoders wrote")
    parser.add_argument("--test", nargs="+", default=["val"], help="held-out splits; 'val test' for final figures")
    return parser


def main() -> None:
    """Run the command."""
    options = build_parser().parse_args()
    with named_errors():
        report(options)


if __name__ == "__main__":
    main()
