"""The report's section of weights: realism, memorisation, what a mask changes, contrast, a classifier's map."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from carim_aug.tools.plots import contact_sheet
from train.classifier.densenet import ChestClassifier
from train.classifier.encoders import KINDS, features_of, load_encoder
from train.common.cache import digest_files
from train.common.images import to_symmetric
from train.metrics import generator_quality as quality
from train.metrics.generator_quality import Features, matched_pairs
from train.reproduction.patches import SIZE
from train.reproduction.report.context import CLASSES, Model, Report, digest_code
from train.reproduction.tables import number, quartiles, spanned, table

Figures = Mapping[str, Any]

PAIRS = {"prior": "boxes of the prior", "ellipse": "the same as ellipses", "random": "boxes anywhere in the image"}


def measure(report: Report) -> dict[str, Any]:
    """Return the figures of all models by name, and draw pictures of them."""
    found = {name: _measure_one(report, model) for name, model in report.models.items()}
    for name, model in report.models.items():
        _draw(report, name, model, found[name])
    return found


def _measure_one(report: Report, model: Model) -> dict[str, Any]:
    generator, preset, options = model.generator, report.preset.figures, report.options
    recipe = generator.provenance.get("recipe") or {}
    found: dict[str, Any] = {"hash": generator.weights_hash, "size": generator.image_size}
    found["recipe"] = {name: recipe.get(name) for name in ("stage", "images_seen", "architecture")}
    pairs = cache(lambda: matched_pairs(generator, model.prior, preset))

    @cache
    def features(name: str, space: str) -> Features:
        images = pairs().nodule if name == "nodule" else pairs().without
        encode = quality.pixels if space == "pixels" else partial(features_of, load_encoder(report.encoders[space]))
        return Features.of(encode, images, *report.images_of(generator.image_size, name))

    def figure(name: str, compute: Callable[[], Any], **settings: Any) -> Any:
        return report.figure(name, compute, model, by=quality, preset=asdict(preset), **settings)

    encoding = digest_code(features_of.__module__)
    for part, distances in (("realism", quality.realism), ("repeats", quality.repeats)):
        found[part] = {}
        for name, space in product(CLASSES, KINDS if part == "realism" else [*KINDS, "pixels"]):
            compute = partial(lambda d, n, s: d(features(n, s), preset), distances, name, space)
            encoder = "" if space == "pixels" else digest_files([report.encoders[space]]) + encoding
            found[part][f"{name}, {space}"] = figure(f"{part}-{name}-{space}", compute, encoder=encoder)
    found["pairs"] = figure("pairs", lambda: quality.pair_figures(pairs(), preset))
    real, ct = report.images(SIZE)[2], report.ct
    found["contrasts"] = figure("contrasts", lambda: quality.contrasts(pairs(), real, ct), ct=ct is not None)
    if options.classifier:
        classifier = ChestClassifier.load(options.classifier)
        key = digest_files([Path(options.classifier)]) + digest_code(ChestClassifier.__module__)
        look = partial(quality.map_figures, classifier=classifier, preset=preset, finding="Nodule")
        found["maps"] = figure("maps", lambda: look(pairs()), classifier=key)
    return found


def _draw(report: Report, name: str, model: Model, found: Figures) -> None:
    """Draw a contact sheet, and the images nearest to training ones beside these."""
    held_out = report.images(SIZE)[1]
    backgrounds = held_out.symmetric(held_out.normal[:6])
    sheet = contact_sheet((model.generator, model.prior), backgrounds, n=len(backgrounds))
    report.pictures[f"{name}: Pairs and grafts"] = sheet
    pairs = matched_pairs(model.generator, model.prior, report.preset.figures)
    for kind, images in (("normal", pairs.without), ("nodule", pairs.nodule)):
        train, closest = report.images_of(images.shape[-1], kind)[0], found["repeats"][f"{kind}, pixels"]["closest"]
        both = [[images[generated], to_symmetric(train.images[real])] for generated, real in closest]
        columns = [torch.cat([F.pad(image, (2, 2, 2, 2)) for image in pair], dim=1) for pair in both]
        title = f"Generated {kind} images (above) and their nearest training images (below), in pixels"
        report.pictures[f"{name}: {title}"] = torch.cat(columns, dim=2)


def text(figures: Figures) -> list[str]:
    """Return the section's blocks, from all figures of a report."""
    weights = figures["weights"]
    return [
        *_realism(weights, figures["encoders"]),
        *_repeats(weights),
        "## Pairs: what a mask changes",
        _pair_table(weights),
        "## Contrast, inside against ring, beside real boxes (train and held-out)",
        *_contrast_tables(weights),
        *_maps(weights),
    ]


def _realism(weights: Figures, encoders: Figures) -> list[str]:
    rows = []
    for name, figures in weights.items():
        for kind, f in figures["realism"].items():
            spans = [spanned(f[k]) for k in ("fid", "fid_floor", "fid_ratio", "kid_all", "kid_held_out")]
            floor = f"{number(f['kid_floor']['low'])} to {number(f['kid_floor']['high'])}"
            rows.append([name, kind, str(f["n"]), *spans, floor])
    header = "weights|class, encoder|N|FID|FID, real halves|ratio|KID|KID, held-out images|KID, real halves"
    known = "; ".join(
        f"{kind}: {e['features']} features, a linear probe for any finding on val {e['any_finding_auc']:.3f}, nearest "
        f"image of the same patient {e['patient_match']:.2f} (chance {e['patient_chance']:.3f})"
        for kind, e in encoders.items()
    )
    about = (
        "Encoders trained here on train images (no Inception weights): compare with the floor, never with published "
        f"FIDs. {known}. FID and its floor: N images a side, one a patient, over random halves of the training "
        "patients (median and middle 95 % of the splits). KID: all training patients; held-out images show what the "
        "encoder's having seen the training images costs."
    )
    return ["## Realism: FID and KID, and the real-against-real floor", about, table(header, rows)]


def _repeats(weights: Figures) -> list[str]:
    rows = []
    for name, figures in weights.items():
        for kind, f in figures["repeats"].items():
            cells = [spanned(f["share"]), number(f["expected"]), "yes" if f["memorises"] else "no"]
            distances = [quartiles(f[k]) for k in ("generated_to_train", "held_out_to_train")]
            rows.append([name, kind, *cells, *distances])
    header = "weights|class, space|nearest image is a training one|expected|more than chance|distance to train"
    return ["## Memorisation: nearest real images", table(header + "|held-out images' distance to train", rows)]


def _pair_table(weights: Figures) -> str:
    columns = [(name, place) for name in weights for place in PAIRS]
    cells = [weights[name]["pairs"][place] for name, place in columns]
    measures = {
        "energy": (spanned, "energy inside the mask + 1/4 (goal 0.9)"),
        "energy_grafted": (spanned, "the same after the graft's feather"),
        "hit": (spanned, "brightest pixel inside the mask (goal 0.99)"),
        "brighter": (spanned, "brighter than its ring"),
        "lost": (spanned, "adds less than 0.02 of contrast"),
        "added": (quartiles, "contrast added"),
        "roundness": (quartiles, "roundness (1 disc, 0 square)"),
        "half_width": (quartiles, "width at half height over the box's side"),
    }
    rows = [["pairs", *(str(c["n"]) for c in cells)]]
    rows += [[title, *(show(c[name]) for c in cells)] for name, (show, title) in measures.items()]
    moved = [quartiles(weights[name]["pairs"]["equivariance"]) if place == "prior" else "-" for name, place in columns]
    rows.append(["equivariance: correlation of the moved difference with the moved mask's", *moved])
    header = ["same noise, mask against none", *(f"{name}, {PAIRS[place]}" for name, place in columns)]
    return table("|".join(header), rows)


def _contrast_tables(weights: Figures) -> list[str]:
    blocks = []
    for name, figures in weights.items():
        c = figures["contrasts"]
        real = list(c["real"])
        rows = [[r, f"{quartiles(c['real'][r])}, n {c['real'][r]['n']}", *("-" for _ in real)] for r in real]
        rows += [[made, quartiles(v), *(_ks(c["ks"][made][r]) for r in real)] for made, v in c["made"].items()]
        for r, v in c["same_boxes"].items():
            tests = [_ks(v["ks"]) if other == r else "-" for other in real]
            rows.append([f"generated images, at the {r}", quartiles(v), *tests])
        blocks.append(table("|".join([name, "contrast", *(f"KS against {r}" for r in real)]), rows))
        shapes = [[s, quartiles(v["roundness"]), quartiles(v["half_width"])] for s, v in c["shape"].items()]
        blocks.append(table(f"{name}, difference of|roundness|width at half height over the box's side", shapes))
    return blocks


def _maps(weights: Figures) -> list[str]:
    rows = []
    for name, figures in weights.items():
        if m := figures.get("maps"):
            test = f"{m['t']:.1f} (p {number(m['p'])})"
            cells = [spanned(m["inside"]), spanned(m["outside"]), test, quartiles(m["logit_rise"]), spanned(m["rises"])]
            rows.append([name, str(m["n"]), *cells])
    header = "weights|images|CAM inside the mask|outside|paired t|the mask's change of the nodule logit"
    about = "If CARIM maximised this very classifier, this is a training curve, no evidence."
    blocks = ["## A classifier's map (Fig. 7 of Ann 2021)", about, table(f"{header}|share that rises", rows)]
    return blocks if rows else []


def _ks(test: Mapping[str, float]) -> str:
    return f"{test['d']:.2f} (p {number(test['p'])})"
