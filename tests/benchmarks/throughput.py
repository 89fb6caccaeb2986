"""How fast and how large one preset is, as JSON: `python tests/benchmarks/throughput.py --preset fast128`.

Images/s of the fused generator and of whole training steps; GFLOP an image; a discriminator step in one trunk pass
against the plain form of three; what the CARIM loss adds to an iteration; peak memory of it all. Untrained weights:
only the architecture counts. Ratios are of CPU time on CPUs, which other jobs on the machine change little, and of wall
time on CUDA.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from carim_aug.generators.fused import fuse  # noqa: E402
from carim_aug.generators.multiscale import ARCHITECTURES, MultiScaleGenerator  # noqa: E402
from carim_aug.location.prior import LocationPrior  # noqa: E402
from carim_aug.ops.boxes import boxes_to_masks  # noqa: E402
from carim_aug.ops.findings import FINDINGS  # noqa: E402
from carim_aug.ops.precision import autocast  # noqa: E402
from train.classifier.densenet import ChestClassifier  # noqa: E402
from train.common.distributed import launch  # noqa: E402
from train.common.images import NODULE, ImageSet  # noqa: E402
from train.common.loop import frozen  # noqa: E402
from train.gan.batch import draw_batch  # noqa: E402
from train.gan.discriminators import ScaleDiscriminator  # noqa: E402
from train.gan.losses import CARIMRegularizer, discriminator_loss, generator_loss  # noqa: E402
from train.gan.networks import Networks  # noqa: E402
from train.gan.presets import PRESETS, GANPreset  # noqa: E402
from train.gan.step import TrainState, train_step  # noqa: E402


def generator_size(name: str) -> dict[str, float]:
    """Return millions of parameters and GFLOP (two for each multiply-add) an image of an architecture."""
    with torch.device("meta"):
        generator = MultiScaleGenerator(ARCHITECTURES[name]).eval()
        noise, masks = torch.zeros(1, generator.noise_dim), torch.zeros(1, 1, *(2 * [generator.image_size]))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), parametrize.cached():
        generator(noise, masks)
    parameters = sum(p.numel() for p in generator.parameters())
    return {"parameters_m": parameters / 1e6, "gflop": counter.get_total_flops() / 1e9}


def seconds(run: Callable[[], Any], device: torch.device, *, times: int) -> float:
    """Return the median of a call's CPU time, or of its wall time on CUDA; the first call is left out."""
    taken = []
    for _ in range(times + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        started = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - started)
    return statistics.median(taken[1:])


def plain_loss(d: ScaleDiscriminator, real: Tensor, fake: Tensor, classes: Tensor) -> Tensor:
    """Return eq. 3 the plain way: real, generated and mismatched images each through the whole network."""
    return discriminator_loss(d(real, classes), d(fake, classes), d(real, 1 - classes)[1])


def shared_loss(d: ScaleDiscriminator, real: Tensor, fake: Tensor, classes: Tensor) -> Tensor:
    """Return the same as the training does: one pass of trunk and heads, spectral norms worked out once."""
    with parametrize.cached():
        return discriminator_loss(*d.compare(real, fake, classes))


def train_images_per_s(preset: GANPreset, *, device: str, times: int) -> float:
    """Return the rate of whole training steps of stage 1, all branches, without CT nodules, on drawn images."""
    state, n = TrainState.setup(launch(device), Networks(preset), preset), 2 * preset.batch
    size, scales = state.networks.generator.image_size, state.networks.generator.config.branches
    labels = torch.zeros(n, len(FINDINGS))
    labels[::2, NODULE] = 1
    grey = torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageSet(grey, labels, torch.arange(n), [torch.empty(0, 4)] * n, [""] * n).to(device)
    batch = draw_batch(images, LocationPrior.bundled(), None, preset, seed=0, images_seen=0)

    def step() -> None:
        train_step(state, batch, preset, scales=scales, generator=torch.Generator().manual_seed(0))

    return preset.batch / seconds(step, torch.device(device), times=times)


def throughput(
    preset: GANPreset,  # its networks and how often it has the CARIM loss; its own batch is not used
    *,
    device: str,
    classifier: ChestClassifier | None = None,  # of the CARIM loss, which is left out without it
    batch: int = 8,  # images of every call
    times: int = 3,  # calls whose median counts
) -> dict[str, Any]:
    """Return the figures of one preset."""
    where, stream = torch.device(device), torch.Generator().manual_seed(0)
    config = ARCHITECTURES[preset.architecture]
    sizes = [config.image_size >> i for i in reversed(range(config.branches))]
    networks = Networks(preset).to(where, memory_format=torch.channels_last)
    noise = torch.randn(batch, config.noise_dim, generator=stream).to(where)
    half = config.image_size // 2
    boxes = torch.tensor([[half, half, half + 8.0, half + 8.0]]).repeat(batch // 2, 1)
    masks = torch.cat([boxes_to_masks(list(boxes[:, None]), config.image_size)] * 2).to(where)
    masks[batch // 2 :] = 0
    classes = masks.flatten(1).amax(dim=1).long()
    figures: dict[str, Any] = {**generator_size(preset.architecture), "batch": batch}

    # Generator, as users run it.
    for dtype in (torch.float32, torch.bfloat16):
        fast = fuse(networks.generator.eval(), dtype=dtype)
        figures[f"images_per_s_{str(dtype)[6:]}"] = batch / seconds(lambda f=fast: f(noise, masks), where, times=times)
    networks.train()
    figures["train_images_per_s"] = train_images_per_s(replace(preset, batch=batch), device=device, times=times)

    # A discriminator step, both ways.
    real = [(torch.rand(batch, 1, s, s, generator=stream) * 2 - 1).to(where) for s in sizes]
    fake = [x.flip(0) for x in real]

    def update_discriminators(loss: Callable[..., Tensor]) -> None:
        networks.scales.zero_grad(set_to_none=True)
        with autocast(where):
            parts = zip(networks.scales, real, fake, strict=True)
            total = sum((loss(d, x, s, classes) for d, x, s in parts), torch.zeros((), device=where))
        total.backward()

    plain = seconds(lambda: update_discriminators(plain_loss), where, times=times)
    shared = seconds(lambda: update_discriminators(shared_loss), where, times=times)
    figures |= {"d_step_plain_s": plain, "d_step_s": shared, "d_step_gain": plain / shared}

    # A generator step of eq. 4 on every scale, then the CARIM loss by itself, back to the image.
    def update_generator() -> None:
        networks.generator.zero_grad(set_to_none=True)
        with frozen(list(networks.scales)), autocast(where), parametrize.cached():
            images = networks.generator.pyramid(noise, masks)
            parts = zip(networks.scales, images, strict=True)
            total = sum((generator_loss(d(x.float(), classes)) for d, x in parts), torch.zeros((), device=where))
        total.backward()

    figures["g_step_s"] = seconds(update_generator, where, times=times)
    if classifier is not None:
        regularizer = CARIMRegularizer(classifier.to(where), preset.carim_weight, preset.carim_form, preset.carim_every)
        n = batch // 2

        def regularize() -> None:
            images = real[-1][:n].clone().requires_grad_()
            with autocast(where):
                loss = regularizer.loss(images, masks[:n]).loss
            loss.backward()

        carim = seconds(regularize, where, times=times)
        figures |= {"carim_s": carim, "carim_every": regularizer.every}
        figures["carim_share"] = carim / regularizer.every / (shared + figures["g_step_s"])
    on_gpu = where.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated(where) if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {**figures, "peak_gib": peak / 2**30, "device": torch.cuda.get_device_name(where) if on_gpu else "cpu"}


def main() -> None:
    """Print the figures of one preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="fast128")
    parser.add_argument("--classifier", help="file of the CARIM loss's classifier")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    classifier = ChestClassifier.load(args.classifier) if args.classifier else None
    options = {"device": args.device, "batch": args.batch, "times": args.times}
    print(json.dumps(throughput(PRESETS[args.preset], classifier=classifier, **options)))


if __name__ == "__main__":
    main()
