"""Controls that need no training, as generators of `SyntheticNoduleMix` (METHOD 8; EVIDENCE, Quality: controls).

Each takes real films without a finding and shows one of them, chosen by the noise: alone where the mask is empty, with
a nodule in each box of the mask else. As grafts they put the same nodules into the caller's own films. All chance comes
from the noise z ~ N(0, I): its normal distribution function gives uniform draws, on the CPU, so that a sample is the
same on every device and in every batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from carim_aug.data.ct_nodules import CTNodules
from carim_aug.location.density import Support, boxes_to_points, fit_density
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks, check_boxes, check_masks
from carim_aug.ops.random import fold
from carim_aug.ops.sealed import digest
from train.reproduction.controls.maskboxes import boxes_of_masks
from train.reproduction.controls.poisson import poisson_blend

LARGEST_BOX = 0.16  # of the film's side: a nodule is at most 3 cm
PEAKS = (0.05, 0.2)  # of drawn nodules, in units of the [-1, 1] film
_DRAWS, _BOXES = 3, 5  # uniform draws of a box, and boxes that draw anew: a sixth draws as the first does


class FilmControl(ABC):
    """Real films without a finding, and a way to put nodules into them.

    Args:
        films: (N, 1, S, S) uint8, or float in [-1, 1]: hosts of whole images.
        arrays: what else fixes the nodules, by name.
        settings: the same in words.

    Attributes:
        image_size: S.
        noise_dim: length of z.
        value_range: of the images.
        weights_hash: SHA-256, as hex, of the films, the arrays, the settings and the class's name.
        places: True: the nodule is where the mask is.
    """

    noise_dim = 1 + _DRAWS * _BOXES
    value_range = (-1.0, 1.0)
    places = True
    shows_real_films = True

    def __init__(self, films: Tensor, arrays: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
        """Checks and keeps the films."""
        self.films = _checked_films(films, "films")
        self.image_size = int(films.shape[-1])
        self.weights_hash = _hash_of(self, {"films": self.films, **arrays}, settings)

    @torch.no_grad()
    def __call__(self, noise: Tensor, masks: Tensor) -> Tensor:
        """Gives films with a nodule in each box; the same noise with an empty mask gives the same film without.

        Args:
            noise: (B, noise_dim) float, z ~ N(0, I).
            masks: (B, 1, S, S) in {0, 1}, unions of boxes.

        Returns:
            (B, 1, S, S) float32, [-1, 1], on the noise's device.

        Raises:
            ValueError: noise or masks break the rules above.
        """
        _check_call(self, noise, masks)
        hosts = _chosen(self.films, _uniforms(noise)[:, 0]).to(noise.device)
        return self._filled(hosts, noise, masks)

    @torch.no_grad()
    def differences(self, hosts: Tensor, noise: Tensor, masks: Tensor) -> Tensor:
        """Gives what the nodules add to the caller's own films: exactly 0 outside the boxes.

        Args:
            hosts: (B, 1, S, S) float, [-1, 1]. Never changed.
            noise: as in a call.
            masks: as in a call.

        Returns:
            (B, 1, S, S) of the hosts' dtype and device.

        Raises:
            ValueError: hosts, noise or masks break the rules above.
        """
        _check_call(self, noise, masks)
        size = self.image_size
        if tuple(hosts.shape) != (len(noise), 1, size, size):
            raise ValueError(f"hosts must be ({len(noise)}, 1, {size}, {size}), got {tuple(hosts.shape)}")
        whole = hosts.float()
        return (self._filled(whole, noise, masks) - whole).to(hosts.dtype)

    @abstractmethod
    def _with_nodule(self, host: Tensor, box: Tensor, uniforms: Tensor) -> Tensor:
        """Gives one film with one nodule more.

        Args:
            host: (1, 1, S, S) float32, [-1, 1]. Never changed.
            box: (4,) XYXY in pixels, whole numbers, on the CPU.
            uniforms: (3,) float64 in [0, 1), on the CPU.
        """

    def _filled(self, hosts: Tensor, noise: Tensor, masks: Tensor) -> Tensor:
        """One by one: no sample depends on its batch, not by a rounding."""
        filled = hosts.clone()
        draws = _uniforms(noise)[:, 1:].reshape(len(noise), _BOXES, _DRAWS)
        for i, boxes in enumerate(boxes_of_masks(masks)):
            for j, box in enumerate(boxes):
                filled[i : i + 1] = self._with_nodule(filled[i : i + 1], box, draws[i, j % _BOXES])
        return filled


class DrawnNodules(FilmControl):
    """A drawn Gaussian blob in each box, fading to nothing at the ellipse inscribed in it.

    Args:
        films: (N, 1, S, S) uint8, or float in [-1, 1], real films without a finding.
        peaks: least and largest brightness of a blob's middle, in units of the [-1, 1] film.
    """

    def __init__(self, films: Tensor, *, peaks: tuple[float, float] = PEAKS) -> None:
        """Keeps films and peaks."""
        if not 0 < peaks[0] <= peaks[1] <= 2:
            raise ValueError(f"peaks must be 0 < least <= largest <= 2, got {peaks}")
        self.peaks = (float(peaks[0]), float(peaks[1]))
        super().__init__(films, {}, {"peaks": self.peaks})

    def _with_nodule(self, host: Tensor, box: Tensor, uniforms: Tensor) -> Tensor:
        rim = float(np.exp(-1.5))
        shape = ((gaussian_blobs(box[None], self.image_size) - rim) / (1 - rim)).clamp(min=0).to(host)
        peak = self.peaks[0] + (self.peaks[1] - self.peaks[0]) * float(uniforms[0])
        return torch.minimum(host + peak * shape, host.clamp(min=1.0))


class CopiedNodules(FilmControl):
    """Real boxed nodules copied into each box, blended by their gradients (Perez et al. 2003).

    A copy is scaled to the mask's box, so that the box stays true; to keep the scaling small and the texture sharp, it
    is one of the real nodules whose boxes are nearest in width and height. The ellipse inscribed in the mask's box is
    blended; outside it nothing changes. Left out are real nodules that do not survive the blend: those whose rim
    crosses a bright edge (heart, diaphragm, pleura), which would show as a scar, and those that darken a flat film.

    Args:
        films: (N, 1, S, S) uint8, or float in [-1, 1], real films without a finding.
        nodules: (K, 1, S, S) uint8, or float in [-1, 1], films with a nodule, one row a box.
        boxes: (K, 4) XYXY in pixels; those wider or higher than 0.16 of the side are left out.
        roughest: largest standard deviation along the rim of a real nodule's ellipse, in units of the [-1, 1] film.
        neighbours: real nodules next in size that a box chooses from.

    Attributes:
        nodules: (M, 1, S, S), the rows that are used.
        boxes: (M, 4) of them.
    """

    def __init__(
        self, films: Tensor, nodules: Tensor, boxes: Tensor, *, roughest: float = 0.2, neighbours: int = 16
    ) -> None:
        """Keeps films and the nodules that can be copied."""
        self.nodules = _checked_films(nodules, "nodules")
        if nodules.shape[-1] != films.shape[-1]:
            raise ValueError(f"nodules must be as large as films ({films.shape[-1]}), got {nodules.shape[-1]}")
        check_boxes(boxes, int(films.shape[-1]))
        if len(boxes) != len(nodules):
            raise ValueError(f"boxes must be as many as nodules ({len(nodules)}), got {len(boxes)}")
        if not roughest > 0:
            raise ValueError(f"roughest must be > 0, got {roughest}")
        if neighbours < 1:
            raise ValueError(f"neighbours must be >= 1, got {neighbours}")
        boxes = boxes.detach().cpu().float()
        small = (boxes[:, 2:] - boxes[:, :2] <= LARGEST_BOX * films.shape[-1]).all(dim=1)
        kept = small.nonzero()[:, 0]
        kept = kept[_survive(_scaled(self.nodules[kept]), boxes[kept], roughest)] if len(kept) else kept
        if not len(kept):
            raise ValueError(
                f"boxes must hold a bright nodule of at most {LARGEST_BOX} of the side with a rim no rougher than "
                f"{roughest}, got none in {len(boxes)}"
            )
        self.nodules, self.boxes, self.neighbours = self.nodules[kept], boxes[kept], int(neighbours)
        arrays = {"nodules": self.nodules, "boxes": self.boxes}
        super().__init__(films, arrays, {"neighbours": self.neighbours})

    def _with_nodule(self, host: Tensor, box: Tensor, uniforms: Tensor) -> Tensor:
        size = self.image_size
        x1, y1, x2, y2 = (int(edge) for edge in box)
        wanted = box[2:] - box[:2]
        unlike = ((self.boxes[:, 2:] - self.boxes[:, :2]).log() - wanted.log()).norm(dim=1)
        nearest = unlike.argsort(stable=True)[: self.neighbours]
        chosen = int(nearest[_index(uniforms[0], len(nearest))])

        # What is copied, with the ring of one pixel that the blend reads.
        real = self.boxes[chosen]
        half = (real[2:] - real[:2]) / 2 * (1 + 2 / wanted)
        centre = (real[:2] + real[2:]) / 2
        left, top = (int(edge) for edge in (centre - half).round().clamp(0, size - 2))
        right, bottom = (
            max(int(edge), low + 2) for edge, low in zip((centre + half).round(), (left, top), strict=True)
        )
        crop = _scaled(self.nodules[chosen : chosen + 1, :, top:bottom, left:right]).to(host.device)
        ring = (y2 - y1 + 2, x2 - x1 + 2)
        crop = F.interpolate(crop, size=ring, mode="bicubic", align_corners=False, antialias=True)

        source = F.pad(torch.zeros_like(host), (1, 1, 1, 1))
        source[:, :, y1 : y2 + 2, x1 : x2 + 2] = crop
        inside = boxes_to_masks([box[None]], size, shape="ellipse").to(host.device) > 0
        steps = int(wanted.max()) ** 2
        return poisson_blend(host, source[:, :, 1:-1, 1:-1], inside, steps=max(steps, 16))


class SuperimposedNodules(FilmControl):
    """Real CT nodules in projection, superimposed in each box (Litjens et al. 2010).

    Args:
        films: (N, 1, S, S) uint8, or float in [-1, 1], real films without a finding.
        templates: of CT nodules.
        contrast: 10th and 90th percentile of the nodules' peak, as `CTNodules.superimpose` has it.
        fill: share of the box that a nodule spans, as there; None: as loose as real boxes are.
    """

    def __init__(
        self,
        films: Tensor,
        templates: CTNodules,
        *,
        contrast: tuple[float, float] = (0.07, 0.27),
        fill: tuple[float, float] | None = (0.9, 1.0),
    ) -> None:
        """Keeps films and templates."""
        if not isinstance(templates, CTNodules):
            raise TypeError(f"templates must be CTNodules, got {type(templates).__name__}")
        if not 0 < contrast[0] <= contrast[1] <= 2:
            raise ValueError(f"contrast must be 0 < low <= high <= 2, got {contrast}")
        if fill is not None and not 0 < fill[0] <= fill[1] <= 1:
            raise ValueError(f"fill must be 0 < low <= high <= 1, or None, got {fill}")
        self.templates, self.contrast, self.fill = templates, contrast, fill
        arrays = {"templates": templates.templates, "extents": templates.extents_mm}
        super().__init__(films, arrays, {"contrast": contrast, "fill": fill, "field_mm": templates.field_mm})

    def _with_nodule(self, host: Tensor, box: Tensor, uniforms: Tensor) -> Tensor:
        stream = torch.Generator().manual_seed(fold(*(int(u * 2**53) for u in uniforms.tolist())))
        return self.templates.superimpose(host, box[None], stream, self.contrast, fill=self.fill)[0]


class DuplicatedFilms:
    """Real films again, whole: one with a nodule wherever the mask is not empty, else one without.

    The control of every gain by count alone: nothing in it is new. A nodule lies where it lies, not where the mask is;
    so it serves for whole images of classifiers only.

    Args:
        normal: (N, 1, S, S) uint8, or float in [-1, 1], films without a finding.
        nodule: (K, 1, S, S) of the same kind, films with a nodule.

    Attributes:
        image_size: S.
        noise_dim: length of z: 1.
        value_range: of the images.
        weights_hash: SHA-256, as hex, of all films.
        places: False.
    """

    noise_dim = 1
    value_range = (-1.0, 1.0)
    places = False
    shows_real_films = True

    def __init__(self, normal: Tensor, nodule: Tensor) -> None:
        """Checks and keeps the films."""
        self.normal, self.nodule = _checked_films(normal, "normal"), _checked_films(nodule, "nodule")
        if nodule.shape[-1] != normal.shape[-1]:
            raise ValueError(f"nodule must be as large as normal ({normal.shape[-1]}), got {nodule.shape[-1]}")
        self.image_size = int(normal.shape[-1])
        self.weights_hash = _hash_of(self, {"normal": self.normal, "nodule": self.nodule}, {})

    def __call__(self, noise: Tensor, masks: Tensor) -> Tensor:
        """Gives real films; see `FilmControl.__call__` for arguments, result and errors."""
        _check_call(self, noise, masks)
        uniforms, asked = _uniforms(noise)[:, 0], masks.flatten(1).any(dim=1).cpu()
        films = torch.empty(len(noise), 1, self.image_size, self.image_size)
        films[asked] = _chosen(self.nodule, uniforms[asked])
        films[~asked] = _chosen(self.normal, uniforms[~asked])
        return films.to(noise.device)


def uniform_prior(prior: LocationPrior | None = None) -> LocationPrior:
    """Gives masks at random places: a prior's counts and sizes, but centres anywhere in the film that hold the box.

    Sizes and aspects are log-normal, with the mean and the spread of 1,000 draws of `prior`; so a gain that is owed to
    the places shows as the difference between the two.

    Args:
        prior: whose sizes and counts; None: the bundled one.
    """
    prior = LocationPrior.bundled() if prior is None else prior
    rng = np.random.default_rng(0)
    boxes = np.concatenate([prior.draw(rng)[:1] for _ in range(1000)]).astype(np.float64)
    own = prior.density.support
    anywhere = Support(np.ones_like(own.field), own.size_bounds, own.max_aspect)
    points, alike = boxes_to_points(boxes, 1, 1), np.ones(len(boxes))
    # All of the density is its broad part, less a rest that no draw meets but that a prior must have.
    density = fit_density(
        points, alike, np.arange(len(boxes)), anywhere, rhos=(0.0,), broad_shares=(1 - 1e-12,), ties=(0.0,)
    )
    about = f"anywhere in the film, with the sizes of: {prior.description}"
    return LocationPrior(density, prior.counts, n_boxes=prior.n_boxes, n_patients=prior.n_patients, description=about)


def gaussian_blobs(boxes: Tensor, size: int) -> Tensor:
    """Gives Gaussian blobs, one a box: exp(-1.5 r^2), r = 1 on the ellipse inscribed in the box.

    Args:
        boxes: (B, 4) XYXY in pixels.
        size: side of the image in pixels.

    Returns:
        (B, 1, size, size) float32, (0, 1]; nowhere 0.
    """
    ticks = torch.arange(size) + 0.5
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    x, y = ((ticks - centre[:, i, None]) / half[:, i, None] for i in (0, 1))
    return torch.exp(-1.5 * (x[:, None, :] ** 2 + y[:, :, None] ** 2))[:, None]


def _uniforms(noise: Tensor) -> Tensor:
    """Uniform draws (B, noise_dim) in [0, 1), float64 on the CPU."""
    return torch.special.ndtr(noise.detach().cpu().double()).clamp(max=1 - 2**-53)


def _survive(films: Tensor, boxes: Tensor, roughest: float) -> Tensor:
    """Which real nodules (K,) have a smooth rim and are, blended into a flat film, brighter than it."""
    inside = boxes_to_masks(list(boxes[:, None]), films.shape[-1], shape="ellipse") > 0
    rim = (F.max_pool2d(inside.float(), 3, 1, 1) > 0) & ~inside
    steps = int((boxes[:, 2:] - boxes[:, :2]).max()) ** 2
    added = poisson_blend(torch.zeros_like(films), films / 2, inside, steps=steps)  # half as bright: nothing saturates
    rough = torch.stack([film[where].std() for film, where in zip(films, rim, strict=True)])
    return (rough <= roughest) & (added.sum(dim=(1, 2, 3)) > 0)


def _index(uniform: Tensor, n: int) -> int:
    return min(int(float(uniform) * n), n - 1)


def _chosen(films: Tensor, uniforms: Tensor) -> Tensor:
    return _scaled(films[[_index(u, len(films)) for u in uniforms]])


def _scaled(films: Tensor) -> Tensor:
    return films if films.is_floating_point() else films.float() / 127.5 - 1


def _hash_of(control: object, arrays: Mapping[str, Tensor], settings: Mapping[str, object]) -> str:
    texts = {"control": type(control).__name__} | {name: repr(value) for name, value in settings.items()}
    return digest({name: array.numpy() for name, array in arrays.items()}, texts)


def _checked_films(films: Tensor, name: str) -> Tensor:
    """Films on the CPU, uint8 or float32; an error that names the argument where they are none."""
    if films.ndim != 4 or films.shape[1] != 1 or films.shape[2] != films.shape[3] or not len(films):
        raise ValueError(f"{name} must be (N, 1, S, S) with N >= 1, got {tuple(films.shape)}")
    if films.dtype == torch.uint8:
        return films.detach().cpu().contiguous()
    if not films.is_floating_point():
        raise TypeError(f"{name} must be uint8 or floating point, got {films.dtype}")
    low, high = (float(value) for value in films.aminmax())
    if not -1 <= low <= high <= 1:
        raise ValueError(f"{name} must be in [-1, 1], got values in [{low}, {high}]")
    return films.detach().cpu().float().contiguous()


def _check_call(control: FilmControl | DuplicatedFilms, noise: Tensor, masks: Tensor) -> None:
    if noise.ndim != 2 or noise.shape[1] != control.noise_dim or not noise.is_floating_point():
        raise ValueError(f"noise must be (B, {control.noise_dim}) float, got {tuple(noise.shape)} {noise.dtype}")
    check_masks(masks, control.image_size)
    if len(masks) != len(noise):
        raise ValueError(f"masks must be as many as noise ({len(noise)}), got {len(masks)}")
