"""Names of findings and classes: the usual lists in their published order, and which spellings mean the same."""

from collections.abc import Sequence

CHESTXRAY14 = tuple(
    "Atelectasis|Cardiomegaly|Effusion|Infiltration|Mass|Nodule|Pneumonia|Pneumothorax|Consolidation|Edema|Emphysema|"
    "Fibrosis|Pleural_Thickening|Hernia".split("|")
)
"""The 14 findings of ChestX-ray14 in their official order (torchxrayvision sorts them: ``LabelPolicy.named_by``)."""

TORCHXRAYVISION18 = tuple(
    "Atelectasis|Consolidation|Infiltration|Pneumothorax|Edema|Emphysema|Fibrosis|Effusion|Pneumonia|Pleural_Thickening|"
    "Cardiomegaly|Nodule|Mass|Hernia|Lung Lesion|Fracture|Lung Opacity|Enlarged Cardiomediastinum".split("|")
)
"""torchxrayvision's ``datasets.default_pathologies``."""

OTHER, UNKNOWN = "other", "unknown"
"""Classes of multi-label rows: findings, but no nodule; no word on nodules."""

NORMAL_WORDS = ("no finding", "normal", "healthy")
"""Words for a film without a finding, in `plain` spelling."""


def plain(name: str) -> str:
    """A name in lower case, with blanks for underscores."""
    return name.replace("_", " ").strip().lower()


def find(name: str, names: Sequence[str]) -> str | None:
    """The one of ``names`` that is meant by ``name``, or None."""
    if name in names:
        return name
    wanted = NORMAL_WORDS if plain(name) in NORMAL_WORDS else (plain(name),)
    return next((n for n in names if plain(n) in wanted), None)
