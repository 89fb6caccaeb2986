"""The report as text: figures to Markdown tables, tables and pictures to one HTML page."""

import base64
import html
import io
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

Row = list[str]

PAIRS = {"prior": "boxes of the prior", "ellipse": "the same as ellipses", "random": "boxes anywhere in the image"}


def markdown(figures: Mapping[str, Any]) -> str:
    """Gives all tables of a report's figures, as `train.reproduction.report.building` makes them."""
    weights = figures.get("weights", {})
    named = "; ".join(f"{name} {w['hash'][:12]}, {_stage(w)}" for name, w in weights.items())
    parts = [
        "# Figures",
        f"Held-out films: {', '.join(figures['test'])}. Intervals are 95 %; [[..]] are quartiles. "
        + (f"Weights: {named}. " if named else "")
        + f"Commit {figures['git_commit'][:12]}.",
    ]
    if weights:
        parts += [
            *_realism(weights, figures["encoders"]),
            *_repeats(weights),
            "## Pairs: what a mask changes",
            pair_table(weights),
            "## Contrast, inside against ring, beside real boxes (train and held-out)",
            *contrast_tables(weights),
            *_maps(weights),
        ]
    if "patches" in figures:
        parts += _patches(figures["patches"])
    if "speed" in figures:
        parts += _speed(figures["speed"])
    return "\n\n".join(parts) + "\n"


def _realism(weights: Mapping[str, Any], encoders: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, figures in weights.items():
        for kind, f in figures["realism"].items():
            rows.append(
                [
                    name,
                    kind,
                    str(f["n"]),
                    spanned(f["fid"]),
                    spanned(f["fid_floor"]),
                    spanned(f["fid_ratio"]),
                    spanned(f["kid_all"]),
                    spanned(f["kid_held_out"]),
                    f"{number(f['kid_floor']['low'])} to {number(f['kid_floor']['high'])}",
                ]
            )
    header = "weights|class, encoder|N|FID|FID, real halves|ratio|KID|KID, held-out films|KID, real halves"
    known = "; ".join(
        f"{kind}: {e['features']} features, a linear probe for any finding on val {e['any_finding_auc']:.3f}, nearest "
        f"film of the same patient {e['patient_match']:.2f} (chance {e['patient_chance']:.3f})"
        for kind, e in encoders.items()
    )
    text = (
        "Encoders trained here on train films (no Inception weights): compare with the floor, never with published "
        f"FIDs. {known}. FID and its floor: N films a side, one a patient, over random halves of the training patients "
        "(median and middle 95 % of the splits). KID: all training patients; held-out films show what the encoder's "
        "having seen the training films costs."
    )
    return ["## Realism: FID and KID, and the real-against-real floor", text, table(header, rows)]


def _repeats(weights: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            kind,
            spanned(f["share"]),
            number(f["expected"]),
            "yes" if f["memorises"] else "no",
            quartiles(f["generated_to_train"]),
            quartiles(f["held_out_to_train"]),
        ]
        for name, figures in weights.items()
        for kind, f in figures["repeats"].items()
    ]
    header = "weights|class, space|nearest film is a training one|expected|more than chance|distance to train"
    return ["## Memorisation: nearest real films", table(header + "|held-out films' distance to train", rows)]


def pair_table(weights: Mapping[str, Any]) -> str:
    """Gives the table of `train.metrics.generator_quality.pair_figures`, by names of weights."""
    columns = [(name, place) for name in weights for place in PAIRS]
    cells = [weights[name]["pairs"][place] for name, place in columns]
    names = {
        "energy": "energy inside the mask + 1/4 (goal 0.9)",
        "energy_grafted": "the same after the graft's feather",
        "hit": "brightest pixel inside the mask (goal 0.99)",
        "brighter": "brighter than its ring",
        "lost": "adds less than 0.02 of contrast",
    }
    rows = [["pairs", *(str(c["n"]) for c in cells)]]
    rows += [[text, *(spanned(c[name]) for c in cells)] for name, text in names.items()]
    for name, text in (
        ("added", "contrast added"),
        ("roundness", "roundness (1 disc, 0 square)"),
        ("half_width", "width at half height over the box's side"),
    ):
        rows.append([text, *(quartiles(c[name]) for c in cells)])
    moved = [quartiles(weights[name]["pairs"]["equivariance"]) if place == "prior" else "-" for name, place in columns]
    rows.append(["equivariance: correlation of the moved difference with the moved mask's", *moved])
    header = "|".join(["same noise, mask against none", *(f"{name}, {PAIRS[place]}" for name, place in columns)])
    return table(header, rows)


def contrast_tables(weights: Mapping[str, Any]) -> list[str]:
    """Gives the tables of `train.metrics.generator_quality.contrasts`, two for each name of weights."""
    parts = []
    for name, figures in weights.items():
        c = figures["contrasts"]
        real = list(c["real"])
        rows = [[r, f"{quartiles(c['real'][r])}, n {c['real'][r]['n']}", *("-" for _ in real)] for r in real]
        for made, values in c["made"].items():
            tests = [f"{t['d']:.2f} (p {number(t['p'])})" for t in (c["ks"][made][r] for r in real)]
            rows.append([made, quartiles(values), *tests])
        for r, values in c["same_boxes"].items():
            here = [f"{values['ks']['d']:.2f} (p {number(values['ks']['p'])})" if o == r else "-" for o in real]
            rows.append([f"generated films, at the {r}", quartiles(values), *here])
        parts.append(table("|".join([name, "contrast", *(f"KS against {r}" for r in real)]), rows))
        shapes = [[s, quartiles(v["roundness"]), quartiles(v["half_width"])] for s, v in c["shape"].items()]
        parts.append(table(f"{name}, difference of|roundness|width at half height over the box's side", shapes))
    return parts


def _maps(weights: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            str(m["n"]),
            spanned(m["inside"]),
            spanned(m["outside"]),
            f"{m['t']:.1f} (p {number(m['p'])})",
            quartiles(m["logit_rise"]),
            spanned(m["rises"]),
        ]
        for name, figures in weights.items()
        if (m := figures.get("maps"))
    ]
    if not rows:
        return []
    header = "weights|films|CAM inside the mask|outside|paired t|the mask's change of the nodule logit|share that rises"
    text = "If CARIM maximised this very classifier, this is a training curve, no evidence."
    return ["## A classifier's map (METHOD 8, Fig. 7)", text, table(header, rows)]


def _patches(figures: Mapping[str, Any]) -> list[str]:
    learnt = [
        [name, f"{r['auc']:.3f} [{r['low']:.3f}, {r['high']:.3f}]", " ".join(f"{s:.3f}" for s in r["seeds"])]
        for name, r in figures["worth"].items()
    ]
    found = [
        [f"{name}, held-out" if name == "real boxes" else name, str(r["n"]), spanned(r)]
        for name, r in figures["hits"].items()
    ]
    boxes = figures["boxes"]
    text = (
        f"Patches of 48 x 48 pixels at 256, high-passed; {boxes['train']} real boxes of train patients, "
        f"{boxes['held-out']} held-out ones against {figures['places']} places in normal films; "
        "intervals over patients."
    )
    return [
        "## What a patch classifier learns from each source",
        text,
        table("learnt from|AUC on real boxes|each network", learnt),
        "Hit rate of the one that learnt real boxes, at 90 % specificity on places in normal films:",
        table("nodules|n|found", found),
    ]


def _speed(figures: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, f in figures.items():
        carim = f"{f['carim_share']:.1%} (every {f['carim_every']})" if "carim_share" in f else "-"
        rows.append(
            [
                name,
                f"{f['parameters_m']:.1f}",
                f"{f['gflop']:.2f}",
                f"{f['images_per_s_float32']:.1f} / {f['images_per_s_bfloat16']:.1f}",
                f"{f['d_step_gain']:.2f}x",
                carim,
                f"{f['peak_gib']:.1f}",
            ]
        )
    where = next(iter(figures.values()))["device"] if figures else ""
    header = "preset|parameters, M|GFLOP an image|images/s, float32 / bfloat16|D step against three passes"
    text = f"On {where}; CPU figures are of CPU time, so images/s are those of one idle core, without compile."
    return ["## Throughput and memory", text, table(header + "|CARIM's share of an iteration|peak GiB", rows)]


def _stage(figures: Mapping[str, Any]) -> str:
    recipe = figures["recipe"]
    if recipe["stage"] is None:
        return "no recipe"
    return f"stage {recipe['stage']}, {recipe['images_seen']:,} images"


# --- Cells, tables, page ---
def number(value: float) -> str:
    """Gives a number with three significant digits."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def spanned(figure: Mapping[str, float]) -> str:
    """Gives a number with its interval."""
    return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"


def quartiles(figure: Mapping[str, float]) -> str:
    """Gives a median with its quartiles."""
    return f"{number(figure['value'])} [[{number(figure['q1'])}, {number(figure['q3'])}]]"


def table(header: str, rows: list[Row]) -> str:
    """Gives a Markdown table; the header's cells are split at |."""
    cells = header.split("|")
    lines = [cells, ["---"] * len(cells), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(text: str, sheets: Mapping[str, Any]) -> str:
    """Gives one self-contained HTML page.

    Args:
        text: Markdown of headings, paragraphs and tables, as `markdown` gives it.
        sheets: titles and pictures, PIL or (1, H, W) float in [-1, 1].
    """
    blocks = []
    for block in text.strip().split("\n\n"):
        if block.startswith("#"):
            level = len(block) - len(block.lstrip("#"))
            blocks.append(f"<h{level}>{html.escape(block.lstrip('# '))}</h{level}>")
        elif block.startswith("|"):
            lines = [line.strip("| ").split(" | ") for line in block.split("\n")]
            rows = [lines[0], *lines[2:]]
            tags = ["th"] + ["td"] * (len(rows) - 1)
            made = ["".join(f"<{t}>{html.escape(c)}</{t}>" for c in row) for t, row in zip(tags, rows, strict=True)]
            blocks.append("<table>" + "".join(f"<tr>{row}</tr>" for row in made) + "</table>")
        else:
            blocks.append(f"<p>{html.escape(block)}</p>")
    for title, sheet in sheets.items():
        data = base64.b64encode(_png(sheet)).decode()
        blocks.append(
            f"<h3>{html.escape(title)}</h3><img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"
        )
    style = "body{font:15px sans-serif;margin:2em}td,th{border:1px solid #ccc;padding:3px 8px;text-align:left}"
    style += "table{border-collapse:collapse;margin:1em 0}img{max-width:100%}"
    head = f"<!doctype html><meta charset='utf-8'><title>carim_aug: figures</title><style>{style}</style>"
    return head + "\n" + "\n".join(blocks) + "\n"


def _png(sheet: Image.Image | Tensor) -> bytes:
    if isinstance(sheet, Tensor):
        sheet = VF.to_pil_image((sheet.clamp(-1, 1) + 1) / 2)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
