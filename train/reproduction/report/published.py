"""The source's own figures, as printed (METHOD 8), and what they must mean (METHOD 9)."""

from train.metrics.psnr import SOURCE_OFFSET_DB
from train.metrics.rates import corrected_reading

TABLE1: dict[str, tuple[float, float, float, float]] = {
    "dcgan": (70.90, 73.88, 58.33, 54.16),
    "pggan": (49.51, 57.52, 64.52, 65.23),
    "attention": (103.13, 100.02, 61.24, 58.14),
    "carim-without": (64.91, 62.26, 62.96, 60.51),
    "carim": (55.29, 53.13, 67.52, 66.45),
}
"""FID of normal and nodule films (Inception), PSNR of normal films and nodule crops in dB, 48.13 dB too high."""

RATES = ("accuracy", "sensitivity", "specificity", "precision", "f1", "auc")

TABLE2: dict[str, dict[str, float]] = {
    "DS1": dict(zip(RATES, (0.9100, 0.9107, 0.0000, 0.9999, 0.9532, 0.4553), strict=True)),
    "DS2": dict(zip(RATES, (0.6034, 0.5780, 0.6533, 0.7661, 0.6589, 0.6157), strict=True)),
    "DS3": dict(zip(RATES, (0.6113, 0.5807, 0.6793, 0.8009, 0.6733, 0.6300), strict=True)),
    "DS4": dict(zip(RATES, (0.6208, 0.5898, 0.6843, 0.7930, 0.6765, 0.6371), strict=True)),
}
"""As printed; its "auc" is no area (METHOD 9)."""


def corrected_table1() -> dict[str, tuple[float, float]]:
    """Gives the PSNR of normal films and nodule crops on the scale of images in [0, 1]."""
    return {name: (row[2] - SOURCE_OFFSET_DB, row[3] - SOURCE_OFFSET_DB) for name, row in TABLE1.items()}


def corrected_table2() -> dict[str, dict[str, float]]:
    """Gives accuracy, sensitivity, specificity, precision and F1 as they must be; DS1's row fits no such test set."""
    told = {}
    for name, row in TABLE2.items():
        if name != "DS1":
            read = corrected_reading(row["accuracy"], row["sensitivity"], row["specificity"], row["precision"])
            told[name] = {
                "accuracy": read.accuracy,
                "sensitivity": read.recall,
                "specificity": read.specificity,
                "precision": read.precision,
                "f1": 2 * read.precision * read.recall / (read.precision + read.recall),
            }
    return told
