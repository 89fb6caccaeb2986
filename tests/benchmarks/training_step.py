"""A DenseNet-121 training step with and without the mix: at most 10 % longer. CPU, 224 px, batch 16, p = 0.25.

Every image is eligible, so a quarter of each batch is generated. Untrained weights: only the architecture counts.
CPU time of one thread, order rotated from round to round: wall time swings by half where other jobs run. The ratio of
whole steps still carries the step's own scatter (its quartiles are shown); the mix's own share hardly does.
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny import generator, prior  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torchvision.models import densenet121  # noqa: E402

from carim_aug import SyntheticNoduleMix  # noqa: E402

RUNS, BATCH, LIMIT = 9, 16, 1.10


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    architectures = sys.argv[2:] or ["fast128"]
    model = densenet121(weights=None, num_classes=2).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = torch.rand(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(BATCH, dtype=torch.long)

    def step(images, labels):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    mixes = {"no mix": lambda x, y: (x, y)}
    for name in architectures:
        for insertion in ("whole", "graft"):
            mixes[f"{name}, {insertion}"] = SyntheticNoduleMix(
                generator(name), prior(), p=0.25, insertion=insertion, eligible=lambda label: True
            )
    whole: dict[str, list[float]] = {name: [] for name in mixes}
    part: dict[str, list[float]] = {name: [] for name in mixes}
    made = []
    for run in range(RUNS + 1):
        names = list(mixes)
        for name in names[run % len(names) :] + names[: run % len(names)]:
            mix = mixes[name]
            start = time.process_time()
            batch = mix(images, labels)
            middle = time.process_time()
            step(*batch)
            end = time.process_time()
            if isinstance(mix, SyntheticNoduleMix):
                made.append(int(mix.last_params.synthetic.sum()))
            if run:  # the first is warm-up
                whole[name].append(end - start)
                part[name].append(middle - start)
    base = statistics.median(whole["no mix"])
    print(f"{torch.get_num_threads()} threads, {statistics.mean(made):.1f} of {BATCH} images generated a step")
    low, _, high = (value / base for value in statistics.quantiles(whole["no mix"]))
    print(f"the plain step alone: {base * 1e3:.0f} ms, quartiles {low:.3f} to {high:.3f} of its median")
    print(f"{'training step, median of 9':32} {'ms':>7} {'ratio':>6} {'of it mix, ms':>14} {'share':>6} {'limit':>6}")
    for name in mixes:
        median, mixing = statistics.median(whole[name]), statistics.median(part[name])
        share = mixing / base
        print(f"{name:32} {median * 1e3:7.0f} {median / base:6.3f} {mixing * 1e3:14.1f} {share:6.3f} {LIMIT:6}")


if __name__ == "__main__":
    main()
