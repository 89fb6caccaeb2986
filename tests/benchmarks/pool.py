"""Grafts from a pool against grafts rendered on the fly: images a second, and how reuse costs variety.

The bundled generator, 224-pixel images in batches of 16, every one of them grafted into, on two threads at most.
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from carim_aug import SyntheticNoduleMix, SyntheticPool  # noqa: E402

RUNS, BATCH, SIZE, REUSES = 15, 16, 256, (1, 2, 4, 8, 16)


def main() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    images = torch.rand(BATCH, 1, 224, 224, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    labels = torch.zeros(BATCH, dtype=torch.int64)
    pool = SyntheticPool.from_pretrained(size=SIZE)
    # Placement looks at each host, which takes as long with a pool as without: both ways are shown.
    mixes = {
        f"{name}, {place}": SyntheticNoduleMix.from_pretrained(p=1.0, insertion="graft", placement=place, pool=source)
        for place in ("prior", "host")
        for name, source in (("rendered on the fly", None), ("from a pool", pool))
    }
    times: dict[str, list[float]] = {name: [] for name in mixes}
    for run in range(RUNS + 2):
        for name, mix in mixes.items():
            start = time.perf_counter()
            mix(images, labels)
            if run >= 2:
                times[name].append(time.perf_counter() - start)
    print(f"{'grafts, placement':32} {'images/s':>9} {'x on the fly':>13}")
    for name, values in times.items():
        base = statistics.median(times[f"rendered on the fly, {name.split(', ')[1]}"])
        median = statistics.median(values)
        print(f"{name:32} {BATCH / median:9.0f} {base / median:13.2f}")

    start = time.perf_counter()
    pool.refresh(64)
    seconds = time.perf_counter() - start
    told = pool.statistics()
    print(
        f"\n{len(pool)} entries take {told['bytes'] / 2**20:.1f} MiB; {64 / seconds:.0f} entries/s are rendered anew\n"
    )

    print(f"{'renewed after so many uses':32} {'distinct':>9} {'most uses':>10}  of {16 * SIZE} draws")
    for reuse in REUSES:
        pool = SyntheticPool.from_pretrained(size=SIZE, reuse=reuse)
        for step in range(16):
            for i in range(SIZE):
                pool.draw((0, step, i))
            pool.refresh()
        told = pool.statistics()
        print(f"{reuse:<32} {told['share_distinct']:9.3f} {told['most_uses']:10.0f}")


if __name__ == "__main__":
    main()
