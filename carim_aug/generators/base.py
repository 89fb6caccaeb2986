"""What `SyntheticNoduleMix` asks of a generator, so that baselines and controls can stand in for the CARIM-cGAN."""

import inspect
from typing import Any, Protocol

from torch import Tensor

_WANTED = ("image_size", "noise_dim", "weights_hash")


class Generator(Protocol):
    """Noise and mask to chest X-rays in [-1, 1]."""

    @property
    def image_size(self) -> int:
        """Side S of the images in pixels."""
        ...

    @property
    def noise_dim(self) -> int:
        """Length of z."""
        ...

    @property
    def weights_hash(self) -> str:
        """SHA-256, as hex, of all that fixes what is generated."""
        ...

    def __call__(self, noise: Tensor, masks: Tensor, /) -> Tensor:
        """Gives images (B, 1, S, S) float, [-1, 1].

        Args:
            noise: (B, noise_dim) float, z ~ N(0, I).
            masks: (B, 1, S, S) in {0, 1}; all zeros gives a normal image.
        """
        ...


def is_generator(thing: Any) -> bool:
    """Gives whether a thing has what `Generator` asks for, without working out its hash; a class is no generator."""
    if isinstance(thing, type) or not callable(thing):
        return False
    return all(inspect.getattr_static(thing, name, None) is not None for name in _WANTED)


def places_nodules(generator: Any) -> bool:
    """Gives whether a generator puts the nodule where the mask is: unless its attribute `places` says no, it does."""
    return bool(getattr(generator, "places", True))


def sees_hosts(generator: Any) -> bool:
    """Gives whether what a graft adds depends on the film that it comes into.

    Such a generator has a method `differences(hosts, noise, masks)`, with hosts (B, 1, S, S) float, [-1, 1], that gives
    (B, 1, S, S) float, [-2, 2]; of all others a graft is G(z, C) - G(z, 0).
    """
    return callable(getattr(generator, "differences", None))


def shows_real_films(generator: Any) -> bool:
    """Gives whether a generator's whole images are real films, as its attribute `shows_real_films` says."""
    return bool(getattr(generator, "shows_real_films", False))
