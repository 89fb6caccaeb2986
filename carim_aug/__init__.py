"""Synthetic lung nodules, generated on the fly, for chest X-ray training loops.

    from carim_aug import SyntheticNoduleMix
    mix = SyntheticNoduleMix.from_pretrained()

Research use; not a medical device.
"""

from importlib.metadata import PackageNotFoundError, version

from carim_aug.generators.base import WorkerDeviceError
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.generators.weights import WeightsError
from carim_aug.generators.whole import WholeImageGenerator
from carim_aug.labels.base import LabelError
from carim_aug.labels.policy import LabelPolicy
from carim_aug.labels.sample import ImageError, LayoutError
from carim_aug.location.prior import LocationPrior, PriorError
from carim_aug.location.restricted import RestrictedPrior
from carim_aug.ops.value_range import Normalization, RangeError, ValueRange
from carim_aug.transforms.amounts import CosineSchedule, LinearSchedule
from carim_aug.transforms.gate import Gate, GateError, cam_gate, contrast_gate, probability_gate
from carim_aug.transforms.guard import SyntheticDataError, assert_real_only
from carim_aug.transforms.loader import MixLoader
from carim_aug.transforms.mix import SyntheticNoduleMix
from carim_aug.transforms.plan import Decision, MixParams

try:
    __version__ = version("carim-aug")
except PackageNotFoundError:  # run from a checkout
    __version__ = "0.0.0"

__all__ = [
    "CosineSchedule",
    "Decision",
    "Gate",
    "GateError",
    "ImageError",
    "LabelError",
    "LabelPolicy",
    "LayoutError",
    "LinearSchedule",
    "LocationPrior",
    "MixLoader",
    "MixParams",
    "NoduleGenerator",
    "Normalization",
    "PriorError",
    "RangeError",
    "RestrictedPrior",
    "SyntheticDataError",
    "SyntheticNoduleMix",
    "ValueRange",
    "WeightsError",
    "WholeImageGenerator",
    "WorkerDeviceError",
    "assert_real_only",
    "cam_gate",
    "contrast_gate",
    "probability_gate",
]
