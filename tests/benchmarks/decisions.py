"""Are decisions byte-equal however the data are loaded? One row for each way, against one plain pass."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import warnings  # noqa: E402

from tiny import Films, decisions, make_mix  # noqa: E402
from torch.utils.data import DistributedSampler  # noqa: E402

N, EPOCHS = 300, 3
OPTIONS = dict(p=0.5, seed=11)
ADDED = dict(n_synthetic={"Nodule": 80}, seed=11)


def rows(options, dataset=None, *, epochs=EPOCHS, **loading):
    """Decisions of each epoch."""
    loader = make_mix(**options).loader(dataset or Films(N), **{"batch_size": 7, **loading})
    return [decisions(loader, lambda: loader.last_params) for _ in range(epochs)]


def by_index(epochs):
    return [sorted(epoch) for epoch in epochs]


def ranks(options):
    parts = []
    for rank in (0, 1):
        wrapped = make_mix(**options).wrap(Films(N))
        sampler = DistributedSampler(wrapped, num_replicas=2, rank=rank)
        parts.append(rows(options, wrapped, sampler=sampler))
    return [sorted({*a, *b}) for a, b in zip(*parts, strict=True)]


def resumed(options, **loading):
    """Stopped after five batches of the second epoch, gone on with in a new mix."""

    def fresh():
        return make_mix(**options).loader(Films(N), batch_size=7, shuffle=True, **loading)

    first = fresh()
    seen, part = [decisions(first, lambda: first.last_params)], []
    for step, (_, labels) in enumerate(first, start=1):
        part += decisions([(None, labels)], lambda: first.last_params)
        if step == 5:
            state = first.state_dict()
            break
    second = fresh()
    second.load_state_dict(state)
    return [
        *seen,
        part + decisions(second, lambda: second.last_params),
        decisions(second, lambda: second.last_params),
    ]


def wrapped(options):
    mix, epochs = make_mix(**options), []
    data = mix.wrap(Films(N))
    for epoch in range(EPOCHS):
        mix.set_epoch(epoch)
        slots = [(data.slot(i), data[i][1]) for i in range(len(data))]
        epochs.append([(s.key, s.class_name, s.noise_seed, s.boxes.tobytes(), s.host, y) for s, y in slots])
    return epochs


def main() -> None:
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    print(f"{'decisions':52} {'slots':>6} {'byte-equal':>11}")
    for name, options in (("p=0.5", OPTIONS), ("n_synthetic", ADDED)):
        plain, shuffled = rows(options), rows(options, shuffle=True)
        alone = by_index(plain)

        def row(way, got, expected, name=name):
            slots = sum(map(len, got))
            print(f"{name + ', ' + way:52} {slots:6} {'yes' if got == expected else 'NO':>11}", flush=True)

        for batch_size in (1, 7, 64):
            row(f"batch {batch_size}", rows(options, batch_size=batch_size), plain)
        row("shuffled, by index", by_index(shuffled), alone)
        for workers in (1, 2, 4):
            got = rows(options, shuffle=True, num_workers=workers, multiprocessing_context="fork")
            row(f"{workers} forked workers, shuffled, in order", got, shuffled)
        got = rows(options, num_workers=2, multiprocessing_context="spawn", persistent_workers=True)
        row("2 spawned persistent workers, 3 epochs", got, plain)
        got = rows(options, shuffle=True, num_workers=2, persistent_workers=True)
        row("2 persistent workers, 3 epochs", got, shuffled)
        row("2 ranks, by index", ranks(options), alone)
        row("resumed in mid-epoch", resumed(options), shuffled)
        row("resumed, persistent workers", resumed(options, num_workers=2, persistent_workers=True), shuffled)
        row("wrap (B) and loader (A)", wrapped(options), plain)
        first, second = ([(r[0][2], *r[1:]) for r in epoch] for epoch in plain[:2])
        same = sum(a == b for a, b in zip(first, second, strict=True) if a[1] or b[1])
        print(f"{name + ', the same synthetic slot in epochs 0 and 1':52} {len(first):6} {same:11}")


if __name__ == "__main__":
    main()
