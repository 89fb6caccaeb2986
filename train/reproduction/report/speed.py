"""The report's section of throughput and memory, measured by tests/benchmarks/throughput.py."""

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from train.common.cache import ROOT
from train.reproduction.report.context import Report
from train.reproduction.tables import table

THROUGHPUT = ROOT / "tests" / "benchmarks" / "throughput.py"


def measure(report: Report) -> dict[str, Any]:
    """Return throughput and memory by preset, each in a process of its own."""
    options, times = report.options, report.preset.times

    def run(name: str) -> dict[str, Any]:
        command = [sys.executable, str(THROUGHPUT), "--preset", name, "--times", str(times)]
        command += ["--device", options.device]
        command += ["--classifier", options.classifier] if options.classifier else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{THROUGHPUT} --preset {name} failed: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    more = {"device": options.device, "classifier": bool(options.classifier), "times": times}
    names = report.preset.speed
    return {name: report.cache.figure(f"speed-{name}", partial(run, name), by=THROUGHPUT, **more) for name in names}


def text(figures: Mapping[str, Any]) -> list[str]:
    """Return the section's blocks, from all figures of a report."""
    speed, rows = figures["speed"], []
    for name, f in speed.items():
        speeds = f"{f['images_per_s_float32']:.1f} / {f['images_per_s_bfloat16']:.1f}"
        carim = f"{f['carim_share']:.1%} (every {f['carim_every']})" if "carim_share" in f else "-"
        cells = [f"{f['parameters_m']:.1f}", f"{f['gflop']:.2f}", speeds, f"{f['d_step_gain']:.2f}x"]
        rows.append([name, *cells, carim, f"{f['peak_gib']:.1f}"])
    where = next(iter(speed.values()))["device"]
    header = "preset|parameters, M|GFLOP an image|images/s, float32 / bfloat16|D step against three passes"
    about = f"On {where}; CPU figures are of CPU time, so images/s are those of one idle core, without compile."
    return ["## Throughput and memory", about, table(header + "|CARIM's share of an iteration|peak GiB", rows)]
