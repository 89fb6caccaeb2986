"""CheXNet: `python -m train.classifier --preset chexnet --data FOLDER --out runs/chexnet`.

DenseNet-121 with 14 logits. What we add for the few nodules that there are, each a number of the preset: more images
labelled Nodule in a batch, CT nodules superimposed on normal images. What one of them brings: leave it out, as in
`--set superimposed=0 --out runs/without`, and compare the report.json. The same command resumes.
"""

from lightning.fabric.utilities.rank_zero import rank_zero_only

from train.classifier.presets import PRESETS
from train.classifier.training import train_classifier
from train.common.command import OPTIONS, named_errors, read_options, recipe_parser


def main() -> None:
    """Run the recipe from the command line."""
    names = [name for name in OPTIONS if name != "--compile"]
    parser = recipe_parser(__doc__, *names, preset={"default": "chexnet", "help": f"one of {', '.join(PRESETS)}"})
    parser.add_argument("--weights", help="start from this classifier's file, of the 14 findings")
    parser.add_argument("--test", action="store_true", help="report on the test split too: for final figures")
    with named_errors():
        preset, options = read_options(parser, PRESETS)
        file = train_classifier(preset, **options)
    if getattr(rank_zero_only, "rank", 0) == 0:
        print(f"classifier: {file}")
        print((file.parent / "report.json").read_text())


if __name__ == "__main__":
    main()
