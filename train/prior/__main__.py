"""The location prior, as it is bundled: from readers' boxes, a classifier's maps, or both, as the boxes decide.

    python -m train.prior --data FOLDER --out prior.safetensors [--classifier FILE] [--plot FILE.png]

FOLDER is in ChestX-ray14's layout with split.csv, and ChestX-Det_boxes.csv if there is one. With a classifier, the
prior of Ann (2021) (Grad-CAM maps of the train split's images labelled Nodule, weighted by its score, thresholded into
regions) and mixtures with it are fitted too. Saved is that under which the fitting patients' boxes are likeliest. Then
all are compared with simpler densities on the boxes of val and test patients.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from carim_aug.location.density import boxes_to_points
from carim_aug.location.prior import SIZE_BOUNDS, LocationPrior
from carim_aug.ops.lungs import FIELD_SIZE
from train.classifier.densenet import ChestClassifier
from train.common.command import named_errors, recipe_parser
from train.prior.fitting import fit_best, held_out_points, held_out_table


def plot_priors(priors: Mapping[str, LocationPrior], held_out: np.ndarray, path: Path) -> None:
    """Plot where 20,000 boxes of each prior lie and how large they are, and the same of held-out points (n, 4)."""
    figure = Figure(figsize=(4 * (len(priors) + 1), 4), layout="constrained")
    *places, sizes = figure.subplots(1, len(priors) + 1)
    bins = np.linspace(*SIZE_BOUNDS, 25)
    for axes, (name, prior) in zip(places, priors.items(), strict=True):
        rng = np.random.default_rng(0)
        points = boxes_to_points(np.concatenate([prior.draw(rng) for _ in range(20_000)]).astype(float), 1, 1)
        axes.hist2d(*points[:, :2].T, bins=FIELD_SIZE, range=((0, 1), (0, 1)))
        axes.plot(*held_out[:, :2].T, "r.", markersize=3)
        axes.set(title=name, xlabel="x / width (left is the patient's right)", ylabel="y / height", ylim=(1, 0))
        sizes.hist(np.exp(points[:, 2]), bins=bins, density=True, histtype="step", label=name)
    sizes.hist(np.exp(held_out[:, 2]), bins=bins, density=True, alpha=0.3, color="r", label="held-out boxes")
    sizes.set(title="size", xlabel="sqrt(width x height) / side")
    sizes.legend(fontsize="xx-small", loc="upper left")
    figure.savefig(path, dpi=120)


def main(words: Sequence[str] | None = None) -> None:
    """Fit, choose, save and compare; words: of the command line, by default the process's own."""
    parser = recipe_parser(__doc__, "--data", "--out", out={"help": "safetensors file to write"})
    parser.add_argument("--classifier", type=Path, help="a classifier's file: fit the prior of its maps too")
    parser.add_argument("--plot", type=Path, help="picture of the priors and the held-out boxes to write")
    options = parser.parse_args(words)
    data = Path(options.data)
    with named_errors():
        priors, table = fit_best(data, ChestClassifier.load(options.classifier) if options.classifier else None)
    (best, prior), *others = priors.items()
    prior.save(options.out)
    print(f"{prior}\nfrom {best}; lung field: {prior.field.float().mean():.1%} of the image; to {options.out}\n")
    print(f"Fitting patients' boxes, each under densities fitted without its patient:\n\n{table}\n")
    print(held_out_table(data, prior, others=dict(others)))
    if options.plot:
        plot_priors(priors, held_out_points(data).inside(prior.density.support).points, options.plot)


if __name__ == "__main__":
    main()
