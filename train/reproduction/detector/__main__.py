"""A Faster R-CNN on real nodule boxes, with the mix or without: `python -m train.reproduction.detector --data FOLDER`.

What generated nodules bring a detector (DS2 against DS4 of Ann 2021, for boxes). `--mix 0` is the plain training;
`--mix P` gives each normal image shown a nodule with chance P, of `--source` "graft" (`SyntheticNoduleMix`), "ct" (CT
nodules superimposed) or "drawn-blob", or shows a real boxed image again in its place ("real": oversampling). All see
the same number of images, the same real ones in the same order, and start from the same weights. Some sixty boxed
images teach no detector from nothing: `--preset start --source ct --mix 0.5` makes the common start, once, from CT
nodules alone. A run takes minutes, so one that is cut begins anew; one that is trained is only scored again, as for
`--test test`. `python -m train.reproduction.detector.table RUN RUN ..` compares.
"""

from train.common.command import named_errors, read_options, recipe_parser
from train.reproduction.detector.data import SOURCES
from train.reproduction.detector.training import PRESETS, train_detector


def main() -> None:
    """Run the recipe from the command line."""
    names = ("--preset", "--data", "--out", "--ct-nodules", "--seed", "--device")
    parser = recipe_parser(__doc__, *names, preset={"default": "usual", "choices": sorted(PRESETS)})
    parser.add_argument("--mix", type=float, default=0.0, help="chance of a normal image to be changed")
    parser.add_argument("--source", choices=SOURCES, default="graft", help="what a changed image gets")
    parser.add_argument("--weights", help="folder of the generator; the bundled one by default")
    parser.add_argument("--backbone", help="findings.safetensors of train.classifier.encoders to start from")
    parser.add_argument("--start", help="detector.safetensors of another run to start from")
    parser.add_argument("--test", dest="split", choices=("val", "test"), default="val", help="split to score on")
    with named_errors():
        preset, options = read_options(parser, PRESETS)
        print(train_detector(preset, **options))


if __name__ == "__main__":
    main()
