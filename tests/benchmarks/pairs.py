"""Same-noise pairs of some weights: is the difference at the mask, round, and as bright as a real nodule?

    python tests/benchmarks/pairs.py [--weights FOLDER] [--data FOLDER_IN_CHESTXRAY14_LAYOUT] [--test val test]

Contrast is the mean inside the mask's ellipse minus the mean of a ring about it, in units of the [-1, 1] image at the
generator's size. `python -m train.reproduction.report` shows the same beside all other figures.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from carim_aug.data.ct_nodules import CTNodules  # noqa: E402
from carim_aug.generators.pretrained import NoduleGenerator  # noqa: E402
from carim_aug.location.prior import LocationPrior  # noqa: E402
from train.metrics.generator_quality import FigurePreset, contrasts, matched_pairs, pair_figures  # noqa: E402
from train.reproduction.report.tables import contrast_tables, pair_table  # noqa: E402
from train.reproduction.sources import read_patients  # noqa: E402


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights")
    parser.add_argument("--data")
    parser.add_argument("--ct-nodules")
    parser.add_argument("--test", nargs="+", default=["val"], help="held-out splits beside the train split")
    parser.add_argument("--n", type=int, default=1000)
    args = parser.parse_args()
    generator, preset = NoduleGenerator.from_pretrained(args.weights), FigurePreset(pairs=args.n, moved=args.n)
    pairs = matched_pairs(generator, LocationPrior.bundled(), preset)
    name = generator.weights_hash[:12]
    print(pair_table({name: {"pairs": pair_figures(pairs, preset)}}))
    if args.data:
        ct = CTNodules(args.ct_nodules) if args.ct_nodules else None
        real = read_patients(args.data, ["train", *args.test])
        print("", *contrast_tables({name: {"contrasts": contrasts(pairs, real, ct)}}), sep="\n\n")


if __name__ == "__main__":
    main()
