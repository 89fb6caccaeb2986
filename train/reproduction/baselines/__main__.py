"""All five models of Table 1: `python -m train.reproduction.baselines --preset mini --data FOLDER --out runs/table1`.

Each is trained on the same train split with the same count of real images, into a folder of its own. The CARIM-cGAN
with the loss (it needs `--classifier FILE`) and the one without share their first stage, carim-stage1, and then see
equally many images more. `--ct-nodules FILE` is for these two. The same command resumes, and trains what is missing.
"""

from train.common.command import named_errors, read_options, recipe_parser
from train.reproduction.baselines.presets import MODELS, PRESETS
from train.reproduction.baselines.training import train_model


def main() -> None:
    """Run the recipe from the command line."""
    names = ("--preset", "--data", "--ct-nodules", "--out", "--minutes", "--seed", "--device", "--precision")
    parser = recipe_parser(__doc__, *names, preset={"default": "mini", "choices": sorted(PRESETS)})
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--classifier", help="file of the frozen classifier, for the CARIM loss")
    parser.add_argument("--data-name", default="", help="what the data are called in the weights")
    with named_errors():
        preset, options = read_options(parser, PRESETS)
        for name in options.pop("models"):
            print(f"{MODELS[name]}: {train_model(name, preset, **options)}")


if __name__ == "__main__":
    main()
