"""The CARIM-cGAN: `python -m train.gan --preset fast128 --data FOLDER --out runs/fast128`.

Stage 2 goes on from a run of stage 1: `... --start runs/fast128 --classifier FILE --out runs/stage2`. The same command
resumes. `--weights FOLDER` fine-tunes an exported generator on other images. `--devices 4` trains on four GPUs,
`--nodes 2` on two machines, each started by torchrun or SLURM.

Our extensions to Ann (2021), each a number of the preset: no batch norm in the discriminators, DiffAugment, progressive
branches, matched pairs in every batch (same noise with and without mask), discriminators of crops at the mask, CT
nodules superimposed on normal images, brightness held to that of real images.
"""

from train.common.command import OPTIONS, named_errors, read_options, recipe_parser
from train.gan.presets import PRESETS
from train.gan.training import train_gan


def main() -> None:
    """Run the recipe from the command line."""
    parser = recipe_parser(__doc__, *OPTIONS, preset={"default": "fast128", "help": f"one of {', '.join(PRESETS)}"})
    parser.add_argument("--data-name", default="", help="what the data are called in the weights")
    parser.add_argument("--note", default="", help="kept in the recipe")
    parser.add_argument("--start", help="stage 2: the run of stage 1 to start from")
    parser.add_argument("--classifier", help="stage 2: file of the frozen classifier")
    parser.add_argument("--weights", help="stage 1 from an exported generator, such as carim_aug/weights (fine-tuning)")
    parser.add_argument("--encoder", help="file of train.classifier.encoders: KID and FID on val, the best kept")
    with named_errors():
        preset, options = read_options(parser, PRESETS)
        print(f"weights: {train_gan(preset, **options)}")


if __name__ == "__main__":
    main()
