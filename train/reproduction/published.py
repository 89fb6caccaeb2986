"""What Ann (2021) prints in Tables 1 and 2, and what it must mean (docs/method.md, "Errata")."""

import math

from train.metrics.psnr import OFFSET_DB

TABLE1: dict[str, tuple[float, float, float, float]] = {
    "dcgan": (70.90, 73.88, 58.33, 54.16),
    "pggan": (49.51, 57.52, 64.52, 65.23),
    "attention": (103.13, 100.02, 61.24, 58.14),
    "carim-without": (64.91, 62.26, 62.96, 60.51),
    "carim": (55.29, 53.13, 67.52, 66.45),
}
"""FID of normal and nodule images (Inception), PSNR of normal images and nodule crops in dB, 48.13 dB too high."""

RATES = ("accuracy", "sensitivity", "specificity", "precision", "f1", "auc")

TABLE2: dict[str, dict[str, float]] = {
    "DS1": dict(zip(RATES, (0.9100, 0.9107, 0.0000, 0.9999, 0.9532, 0.4553), strict=True)),
    "DS2": dict(zip(RATES, (0.6034, 0.5780, 0.6533, 0.7661, 0.6589, 0.6157), strict=True)),
    "DS3": dict(zip(RATES, (0.6113, 0.5807, 0.6793, 0.8009, 0.6733, 0.6300), strict=True)),
    "DS4": dict(zip(RATES, (0.6208, 0.5898, 0.6843, 0.7930, 0.6765, 0.6371), strict=True)),
}
"""As printed; its "auc" is no area."""


def corrected_table1() -> dict[str, tuple[float, float]]:
    """Return the PSNR of normal images and nodule crops on the scale of images in [0, 1]."""
    return {name: (row[2] - OFFSET_DB, row[3] - OFFSET_DB) for name, row in TABLE1.items()}


def corrected_table2() -> dict[str, dict[str, float]]:
    """Return accuracy, sensitivity, specificity, precision and F1 as they must be; DS1's row fits no such test set."""
    return {
        name: corrected_reading(*(row[rate] for rate in RATES[:4])) for name, row in TABLE2.items() if name != "DS1"
    }


def corrected_reading(
    accuracy: float, sensitivity: float, specificity: float, precision: float, *, tolerance: float = 2e-4
) -> dict[str, float]:
    """Return what a printed row of Table 2 must mean: its confusion matrix read transposed.

    Printed precision is the recall r, printed sensitivity the precision p, printed specificity the negative predictive
    value; the specificity on as many normal as nodule images is 1 - r (1 - p) / p. ValueError if a figure is no share,
    or accuracy and negative predictive value are further off than rounding to four digits moves them (DS1's are).
    """
    printed = {"accuracy": accuracy, "sensitivity": sensitivity, "specificity": specificity, "precision": precision}
    for name, value in printed.items():
        if not 0 <= value <= 1 or (name == "sensitivity" and value == 0):
            raise ValueError(f"{name} must be a share in [0, 1] (sensitivity above 0), got {value}")
    recall, true = precision, 1 - precision * (1 - sensitivity) / sensitivity
    negatives = true + 1 - recall
    derived = {"accuracy": (recall + true) / 2, "specificity": true / negatives if negatives else math.nan}
    for name, value in derived.items():
        if not abs(value - printed[name]) <= tolerance:
            raise ValueError(
                f"{name} must be {value:.4f} on a test set of two equal halves read transposed, got {printed[name]}"
            )
    f1 = 2 * sensitivity * recall / (sensitivity + recall)
    return {"accuracy": accuracy, "sensitivity": recall, "specificity": true, "precision": sensitivity, "f1": f1}
