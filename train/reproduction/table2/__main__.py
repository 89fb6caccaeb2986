"""Table 2: `python -m train.reproduction.table2 --preset mini --data FOLDER --start FILE --out runs/table2`.

For each arm (`train.reproduction.table2.arms`: DS1 to DS4 of Ann (2021), and controls) and each seed one DenseNet-121,
from the same start, shown the same count of images. A run leaves its scores of val and test images, which
`train.reproduction.report` reads. Arms need what they add: `--without` and `--full` (folders of weights),
`--ct-nodules`. The same command resumes, and does what is missing. `--counts` tells what every data set holds and
trains nothing; `--preset thesis` is the full ChestX-ray14.
"""

import argparse
from dataclasses import replace
from typing import Any

from train.common.command import named_errors, recipe_parser
from train.common.presets import override
from train.common.splits import count_images
from train.reproduction.table2.arms import Sources, arm_counts, find_arm
from train.reproduction.table2.training import PRESETS, choose_arms, counts_text, read_parts, run_arm


def run(options: argparse.Namespace) -> None:
    """Train what is missing of the arms that were asked for, or print counts."""
    preset = PRESETS[options.preset]
    preset = replace(preset, training=override(preset.training, options.set))
    preset = preset if options.test_images is None else replace(preset, test=options.test_images)
    sources = Sources(options.without, options.full, options.ct_nodules)
    names, counts = options.arms or preset.arms, count_images(options.data, split=preset.split, test=preset.test)
    if options.counts:
        print(counts_text(counts, [find_arm(name) for name in names]))
        return
    arms = choose_arms(names, sources, asked=options.arms is not None)
    for arm in arms:  # before anything is trained
        arm_counts(arm, counts["train"]["normal"], counts["train"]["nodule"])
    parts = read_parts(options.data, preset)
    where = {"start": options.start, "out": options.out, "device": options.device}
    for seed in options.seeds or range(preset.seeds):
        for arm in arms:
            result = run_arm(arm, parts, sources, preset, seed=seed, **where)
            print(f"{arm.name}, seed {seed}: done in {result['minutes']} min", flush=True)


def main() -> None:
    """Run the command."""
    changes: dict[str, dict[str, Any]] = {
        "preset": {"default": "mini", "choices": sorted(PRESETS)},
        "set": {"help": "numbers of the training"},
        "out": {"required": False, "default": "runs/table2"},
    }
    names = ("--preset", "--set", "--data", "--ct-nodules", "--out", "--device")
    parser = recipe_parser(__doc__, *names, **changes)
    parser.add_argument("--start", help="file of train.reproduction.table2.start that all start from; else untrained")
    parser.add_argument("--without", help="folder of the weights trained without the CARIM loss: DS3")
    parser.add_argument("--full", help="folder of the full model's weights: DS4 and random-places")
    parser.add_argument("--arms", nargs="+", help="some of the preset's, or others; see train.reproduction.table2.arms")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the preset's first")
    parser.add_argument("--test-images", type=int, help="of each class with the split of Ann (2021), in place of 633")
    parser.add_argument("--counts", action="store_true", help="tell what each data set holds, and train nothing")
    options = parser.parse_args()
    with named_errors():
        run(options)


if __name__ == "__main__":
    main()
