"""Cost of a training step: discriminator step against the plain form, CARIM's share, images/s, GFLOP, memory.

    python tests/benchmarks/gan_step.py [--preset fast128 ...] [--device cpu] [--rounds 5]

Drawn data, untrained networks, all branches. "Plain" is one pass each of real, generated and mismatched images, every
convolution's spectral norm worked out anew, as eq. 3 reads. Times are medians of interleaved rounds, on the CPU those
of one thread, without what other processes take. GFLOP count multiplications and additions of forward and backward, by
`torch.utils.flop_counter`. Memory is the peak so far, of the process or the GPU: presets come in the order given.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from carim_aug.data.chestxray14 import FINDINGS
from carim_aug.generators.multiscale import ARCHITECTURES
from carim_aug.location.prior import LocationPrior
from train.classifier.densenet import ChestClassifier
from train.common.distributed import launched
from train.gan.adversarial import judging_loss
from train.gan.batch import Films, draw_batch
from train.gan.influence import Influence
from train.gan.losses import discriminator_loss
from train.gan.networks import Networks
from train.gan.presets import PRESETS, GANPreset
from train.gan.step import Asked, Wrapped, train_step
from train.gan.training import peak_memory


def seconds(functions: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each function, in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter if device == "cuda" else time.process_time
            started = clock()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, preset: GANPreset, device: str, rounds: int) -> None:
    """Prints one preset's row."""
    fabric, size = launched(device), ARCHITECTURES[preset.architecture].image_size
    where = fabric.device
    torch.manual_seed(0)
    wrapped = Wrapped.setup(fabric, Networks(preset), preset)
    wrapped.networks.train()
    classifier = ChestClassifier(FINDINGS, size=min(size, 224)).eval().requires_grad_(False).to(where)
    influence = Influence(classifier, preset.carim_weight, preset.carim_form, preset.carim_every)
    grey = torch.randint(0, 256, (64, 1, size, size), dtype=torch.uint8)
    films, scales = Films(grey[:32], grey[32:], []).to(where), ARCHITECTURES[preset.architecture].branches
    batch = draw_batch(films, LocationPrior.bundled(), None, preset, seed=0, images_seen=0)
    with torch.no_grad(), fabric.autocast():
        masks = torch.cat([batch.masks, torch.zeros_like(batch.masks)])
        fakes = [x.float() for x in wrapped.draw(torch.cat([batch.noise, batch.noise]), masks, scales)]
    reals = [torch.nn.functional.adaptive_avg_pool2d(batch.images, x.shape[-1]) for x in fakes]
    optimizer, classes = wrapped.optimizers["discriminators"], batch.classes

    def updated(loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()

    def ours() -> None:
        with fabric.autocast(), parametrize.cached():
            pairs = zip(wrapped.compare, reals, fakes, strict=True)
            losses = [judging_loss(c(x, s, classes), relativistic=False) for c, x, s in pairs]
        updated(sum(losses, torch.zeros((), device=where)))

    def plain() -> None:
        losses = []
        with fabric.autocast():
            for d, real, fake in zip(wrapped.networks.scales, reals, fakes, strict=True):
                losses.append(discriminator_loss(d(real, classes), d(fake, classes), d(real, 1 - classes)[1]))
        updated(sum(losses, torch.zeros((), device=where)))

    def step(influence: Influence | None) -> Callable[[], None]:
        def one() -> None:
            stream = torch.Generator().manual_seed(0)
            train_step(wrapped, batch, preset, Asked(scales, influence=influence), generator=stream)

        return one

    took = seconds({"ours": ours, "plain": plain, "step": step(None), "carim": step(influence)}, rounds, device)
    extra = max(took["carim"] - took["step"], 0.0) / preset.carim_every
    whole = took["step"] + extra
    with FlopCounterMode(display=False) as counter:
        step(None)()
    flop = counter.get_total_flops() / preset.batch / 1e9
    print(
        f"| {name} | {preset.batch} | {took['plain'] / took['ours']:.2f} | {extra / whole:.1%} | "
        f"{preset.batch / took['step']:.1f} | {preset.batch / whole:.1f} | {flop:.2f} | {peak_memory(where)} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["tiny", "fast128"], choices=sorted(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread"
    print(f"{where}, torch {torch.__version__}\n")
    print("| preset | batch | D step, plain / ours | CARIM's share | stage 1 images/s | stage 2 | GFLOP/image | MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.preset:
        measure(name, PRESETS[name], args.device, args.rounds)


if __name__ == "__main__":
    main()
