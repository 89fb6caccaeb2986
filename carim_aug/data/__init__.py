"""Real chest X-rays in their official layout, folders, tables of boxes, CT nodules, and drawn phantoms."""

from carim_aug.data.boxes_csv import BoxCSV
from carim_aug.data.chestxray14 import ChestXray14
from carim_aug.data.chestxray14_tables import read_boxes, split_by_patient
from carim_aug.data.ct_nodules import CTNodules
from carim_aug.data.folders import FolderPerClass
from carim_aug.data.io import DataError
from carim_aug.data.phantom import PhantomChest, phantom_chest
from carim_aug.ops.findings import FINDINGS

__all__ = ["BoxCSV", "CTNodules", "ChestXray14", "DataError", "FINDINGS", "FolderPerClass", "PhantomChest"]
__all__ += ["phantom_chest", "read_boxes", "split_by_patient"]
