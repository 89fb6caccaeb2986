"""Real films in their official layout, plain folders, CT nodules, and a drawn phantom for tests."""

from carim_aug.data.chestxray14 import FINDINGS, ChestXray14, read_boxes, split_by_patient
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.data.errors import DataError
from carim_aug.data.folders import BoxCSV, FolderPerClass
from carim_aug.data.phantom import PhantomChest, phantom_chest

__all__ = [
    "FINDINGS",
    "BoxCSV",
    "CTNodules",
    "ChestXray14",
    "DataError",
    "FolderPerClass",
    "PhantomChest",
    "phantom_chest",
    "read_boxes",
    "split_by_patient",
]
