"""Findings in chest X-rays by name, in their published orders: that of ChestX-ray14, once, and torchxrayvision's."""

FINDINGS: tuple[str, ...] = tuple(
    "Atelectasis|Cardiomegaly|Effusion|Infiltration|Mass|Nodule|Pneumonia|Pneumothorax|"
    "Consolidation|Edema|Emphysema|Fibrosis|Pleural_Thickening|Hernia".split("|")
)
"""The 14 findings in their official order, which is that of the label vector (torchxrayvision sorts them by name)."""

TORCHXRAYVISION18: tuple[str, ...] = tuple(
    "Atelectasis|Consolidation|Infiltration|Pneumothorax|Edema|Emphysema|Fibrosis|Effusion|Pneumonia|Pleural_Thickening|"
    "Cardiomegaly|Nodule|Mass|Hernia|Lung Lesion|Fracture|Lung Opacity|Enlarged Cardiomediastinum".split("|")
)
"""torchxrayvision's `datasets.default_pathologies`."""

NORMAL_WORDS = ("no finding", "no findings", "nofinding", "no nodule", "no nodules", "normal", "healthy", "negative")
"""Words for an image without a finding, as `plain` spells them."""


def plain(name: str) -> str:
    """Return a name in lower case, with single blanks for blanks, underscores and hyphens."""
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())
