"""The report's section of patches: what each source of nodules teaches, and what the net of real boxes finds of it."""

import io
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from carim_aug.location.prior import LocationPrior
from carim_aug.ops.random import fold
from train.common.run import write_whole
from train.metrics.patches import PatchNet
from train.metrics.statistics import share
from train.reproduction.patches import (
    SIZE,
    auc_on_real,
    held_out_patches,
    hits,
    named_sources,
    nodule_patches,
    prior_places,
    train_nets,
)
from train.reproduction.report.context import Report, digest_code
from train.reproduction.tables import spanned, table


def measure(report: Report) -> dict[str, Any]:
    """Return what each source teaches a patch classifier, and how many of each the one of real boxes finds."""
    preset, places = report.preset.patches, prior_places(LocationPrior.bundled())
    train, held_out, _ = report.images(SIZE)
    test = cache(lambda: held_out_patches(held_out, places))

    @cache
    def real_nets() -> list[PatchNet]:
        path = report.cache.path("nets", ".pt", by=train_nets, preset=asdict(preset))
        if not path.exists():
            file = io.BytesIO()
            torch.save(nn.ModuleList(train_nets(train, places, None, preset, "real boxes")).state_dict(), file)
            write_whole(path, file.getbuffer())
        with torch.device("meta"):
            nets = nn.ModuleList(PatchNet() for _ in range(preset.seeds))
        nets.load_state_dict(torch.load(path, weights_only=True), assign=True)
        return list(nets.eval())  # type: ignore[arg-type]

    def learn(name: str, source: Any) -> dict[str, Any]:
        nets = real_nets() if source is None else train_nets(train, places, source, preset, name)
        return auc_on_real(nets, test())

    def find(source: Any, how: dict[str, Any]) -> dict[str, Any]:
        patches, generator = test().real, torch.Generator().manual_seed(fold(0, 25))
        if source is not None:
            patches = nodule_patches(held_out, places, source, report.preset.hits, generator, **how)
        return {"n": len(patches), **share(hits(real_nets(), patches, test().normal))}

    def figure(kind: str, name: str, source: Any, compute: Callable[[], Any], **settings: Any) -> Any:
        settings |= {"source": name.partition(" of ")[0], "preset": asdict(preset)}
        if source is not None:
            settings |= {"hash": source.weights_hash, "code": digest_code(source.__module__)}
        return report.cache.figure(kind, compute, by=train_nets, **settings)

    # What is learnt from each source, on real boxes.
    sources = named_sources(("real", "blob", "ct"), train, report.ct)
    sources |= {f"grafts of {name}": model.generator for name, model in report.models.items()}
    learnt = {name: figure("learnt", name, s, partial(learn, name, s)) for name, s in sources.items()}

    # What the net that learnt real boxes finds.
    looked: dict[str, tuple[Any, dict[str, Any]]] = {name: (source, {}) for name, source in sources.items()}
    for name, model in report.models.items():
        looked[f"images of {name}"] = model.generator, {"insertion": "whole"}
        looked[f"images without a mask of {name}"] = model.generator, {"insertion": "whole", "nodule": False}
    n = report.preset.hits
    found = {name: figure("hits", name, s, partial(find, s, how), hits=n) for name, (s, how) in looked.items()}
    boxes = {"train": len(train.each_box()[1]), "held-out": len(held_out.each_box()[1])}
    return {"learnt": learnt, "hits": found, "boxes": boxes, "places": 4 * len(held_out.normal)}


def text(figures: Mapping[str, Any]) -> list[str]:
    """Return the section's blocks, from all figures of a report."""
    patches, learnt, found = figures["patches"], [], []
    for name, r in patches["learnt"].items():
        seeds = " ".join(f"{s:.3f}" for s in r["seeds"])
        learnt.append([name, f"{r['auc']:.3f} [{r['low']:.3f}, {r['high']:.3f}]", seeds])
    for name, r in patches["hits"].items():
        found.append([f"{name}, held-out" if name == "real boxes" else name, str(r["n"]), spanned(r)])
    boxes = patches["boxes"]
    return [
        "## What a patch classifier learns from each source",
        f"Patches of 48 x 48 pixels at 256, high-passed; {boxes['train']} real boxes of train patients, "
        f"{boxes['held-out']} held-out ones against {patches['places']} places in normal images; "
        "intervals over patients.",
        table("learnt from|AUC on real boxes|each network", learnt),
        "Hit rate of the one that learnt real boxes, at 90 % specificity on places in normal images:",
        table("nodules|n|found", found),
    ]
