"""How much faster the fused generator is than the training graph in eval mode: a table of ratios, from one run.

    python tests/benchmarks/fused_speed.py [fast128 fast256 thesis256] [--batch 8] [--clock cpu --threads 1]

All variants take turns, and medians are compared, so that a slower spell of the machine slows them all. On a machine
that other work shares, `--clock cpu --threads 1` counts this process's CPU seconds in place of the clock on the wall.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from carim_aug.generators.fused import fuse
from carim_aug.generators.multiscale import ARCHITECTURES, MultiScaleGenerator

VARIANTS = {
    "float32": {"dtype": torch.float32},
    "float32 + compile": {"dtype": torch.float32, "compile": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 + compile": {"dtype": torch.bfloat16, "compile": True},
}


def measure_call(call: Callable[[], object], clock: Callable[[], float], device: torch.device) -> float:
    """Return the seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(name: str, device: torch.device, *, batch: int, rounds: int, clock: Callable[[], float]) -> None:
    """Print one architecture's rows."""
    torch.manual_seed(0)
    generator = MultiScaleGenerator(ARCHITECTURES[name])
    size, noise = generator.image_size, torch.randn(batch, generator.noise_dim)
    masks = torch.zeros(batch, 1, size, size)
    masks[:, :, size // 2 : size // 2 + 12, size // 3 : size // 3 + 12] = 1
    with torch.no_grad():
        for _ in range(5):  # batch statistics of its own, for maps of an ordinary size
            generator(torch.randn_like(noise), masks)
    generator, noise, masks = generator.eval().to(device), noise.to(device), masks.to(device)

    def training_graph() -> torch.Tensor:
        with torch.inference_mode():
            return generator(noise, masks)

    calls: dict[str, Callable[[], torch.Tensor]] = {"training graph": training_graph}
    first: dict[str, float] = {}
    for variant, options in VARIANTS.items():
        fast = fuse(generator, **options)
        calls[variant] = lambda fast=fast: fast(noise, masks)
    expected = training_graph()
    errors = {}
    for variant, call in calls.items():
        start = time.perf_counter()
        errors[variant] = (call() - expected).abs()
        first[variant] = time.perf_counter() - start
        call()

    seconds: dict[str, list[float]] = {variant: [] for variant in calls}
    for _ in range(rounds):
        for variant, call in calls.items():
            seconds[variant].append(measure_call(call, clock, device))
    base = statistics.median(seconds["training graph"])
    for variant, all_seconds in seconds.items():
        middle, spread = statistics.median(all_seconds), statistics.quantiles(all_seconds, n=4)
        print(
            f"{name:10} {device.type:5} {variant:19} {1000 * middle / batch:8.2f} "
            f"[{1000 * spread[0] / batch:7.2f}, {1000 * spread[2] / batch:7.2f}] {base / middle:6.2f}x "
            f"{first[variant]:8.1f} {errors[variant].max().item():9.1e} {errors[variant].mean().item():9.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["fast128", "fast256", "thesis256"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time

    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch}, {args.clock} clock")
    columns = f"{'ms/image':>8} {'[quartiles]':>18} {'ratio':>7} {'first s':>8} {'max err':>9} {'mean err':>9}"
    print(f"{'':36} {columns}")
    devices = [torch.device("cpu")] + [torch.device("cuda")] * (torch.cuda.is_available() and args.clock == "wall")
    for device in devices:
        for name in args.names:
            torch.compiler.reset()
            measure(name, device, batch=args.batch, rounds=args.rounds, clock=clock)


if __name__ == "__main__":
    sys.exit(main())
