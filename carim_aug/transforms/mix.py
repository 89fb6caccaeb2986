"""`SyntheticNoduleMix`: synthetic lung nodules in a classifier's batches, used as v2.CutMix is (DESIGN 2)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2

from carim_aug.generators.base import Generator, is_generator, places_nodules
from carim_aug.generators.checkpoint import PRIOR, fetch
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.generators.render import Renderer
from carim_aug.labels.policy import LabelPolicy
from carim_aug.labels.sample import Layout, check_images, plain_images
from carim_aug.location.placement import Placement, check_placement
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import LIMIT
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.amounts import added_counts, chances_of
from carim_aug.transforms.apply import Filler, Settled, sizes_of
from carim_aug.transforms.dataset import MixedDataset, PlannedDataset, check_order, takes_anything
from carim_aug.transforms.gate import Gates
from carim_aug.transforms.loader import MixLoader
from carim_aug.transforms.plan import (
    INSERTIONS,
    MixParams,
    Planner,
    check_epoch,
    check_state,
    check_strength,
)
from carim_aug.transforms.pool import SyntheticPool
from train.reproduction.baselines.source import ClassGenerator


class SyntheticNoduleMix(v2.Transform):
    """Puts generated chest X-rays with a nodule, or generated nodules in real ones, into batches.

    Three uses, which decide alike for the same seed, epoch and index (A and B), with any number of workers, batch size,
    order or rank::

        for images, labels in mix.loader(dataset, batch_size=64, shuffle=True, num_workers=8): ...  # A
        loader = DataLoader(mix.wrap(dataset), batch_size=64)                                        # B
        images, labels = mix(images, labels)                                                         # C

    Args:
        generator: noise and mask to images: a `NoduleGenerator`, or any other `carim_aug.generators.base.Generator`. One that
            does not put the nodule where the mask is (`places` False) makes whole images for classifiers only.
        prior: where nodules are drawn.
        p: chance that an eligible slot becomes a synthetic nodule, in [0, 1]; or a dict from class to chance (synthetic
            normal images too); or a function from the epoch to either (`carim_aug.transforms.schedules`). Default 0.5 where
            neither this nor the next two are given.
        n_synthetic: class to number of samples ADDED to the data set (A and B).
        sampling_strategy: imbalanced-learn's words, a ratio, a dict of TOTALS or a callable (A and B); see
            `carim_aug.transforms.amounts.added_counts`.
        insertion: "whole": a generated image takes the slot. "graft": the real image stays and gets
            x + feather(C) * (G(z, C) - G(z, 0)).
        placement: of grafts: "host" looks at each image and draws a place outside its lungs again two times in three,
            about as real nodules lie (`carim_aug.location.placement`); "prior" takes the first draw, unseen; a function from an
            image (1, C, H, W) to a mask (1, 1, h, w) keeps nodules in your own masks.
        strength: of grafts: their difference times this, in (0, 4], or (least, most) to draw from; below 1 for subtler
            nodules. What came of it is in `last_params.contrasts`.
        pool: a `carim_aug.transforms.pool.SyntheticPool` of nodules rendered ahead, for grafts; they come in place of new ones.
        gate: which nodules are good enough: a function, a `carim_aug.transforms.gate.Gate`, or a list of them. Rejected ones are
            drawn again; `gate_report()` counts.
        labels: a `LabelPolicy`, or its kind; "auto" reads the first labels seen.
        layout: where image and label sit in a sample: "auto", or a pair of keys or positions.
        value_range: of the images: "auto" (uint8: [0, 255]; float: [0, 1]), "imagenet", "symmetric" ([-1, 1]), "xrv"
            ([-1024, 1024]), (low, high), or {"mean": ..., "std": ...}.
        eligible: which real labels may be replaced; by default those of the majority class, No Finding in C; all where
            boxes are grafted in.
        seed: of all decisions, 0 to 2**64 - 1.
        device: where to generate; None: where the images are.
        dtype: of the generator's arithmetic: torch.float32 (default) or torch.bfloat16.
        render_batch_size: slots of one generator call.
        compile: put the generator through torch.compile.

    Raises:
        ValueError: a number or name that breaks its rule.
        TypeError: no generator or prior.
    """

    def __init__(
        self,
        generator: Generator,
        prior: LocationPrior,
        *,
        p: float | Mapping[str, float] | Callable[[int], Any] | None = None,
        n_synthetic: Mapping[str, int] | None = None,
        sampling_strategy: str | float | Mapping[str, int] | Callable[[Any], Any] | None = None,
        insertion: str = "whole",
        placement: Placement = "host",
        strength: float | tuple[float, float] = 1.0,
        gate: Any = None,
        pool: SyntheticPool | None = None,
        labels: LabelPolicy | str = "auto",
        layout: Any = "auto",
        value_range: Any = "auto",
        eligible: Callable[[Any], bool] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        render_batch_size: int = 32,
        compile: bool = False,
    ) -> None:
        """Checks the arguments; nothing is drawn or generated."""
        super().__init__()
        if not is_generator(generator):
            raise TypeError(
                "generator must be a NoduleGenerator or have image_size, noise_dim, weights_hash and a call "
                f"(carim_aug.generators.base), got {type(generator).__name__}"
            )
        if not isinstance(prior, LocationPrior):
            raise TypeError(f"prior must be a LocationPrior, got {type(prior).__name__}")
        if pool is not None and not isinstance(pool, SyntheticPool):
            raise TypeError(f"pool must be a SyntheticPool, got {type(pool).__name__}")
        if pool is not None and (insertion != "graft" or pool.generator.weights_hash != generator.weights_hash):
            raise ValueError(
                "pool must hold grafts of the mix's own generator: use from_pretrained(pool=pool, insertion='graft'), "
                f"got insertion={insertion!r}"
            )
        if insertion not in INSERTIONS:
            raise ValueError(f"insertion must be one of {INSERTIONS}, got {insertion!r}")
        if insertion == "graft" and not places_nodules(generator):
            raise ValueError(
                f"insertion must be 'whole' with a {type(generator).__name__}, which does not put the nodule where the "
                f"mask is, got {insertion!r}"
            )
        how = {"p": p, "n_synthetic": n_synthetic, "sampling_strategy": sampling_strategy}
        given = [name for name, value in how.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"give one of p, n_synthetic and sampling_strategy, got {given}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < LIMIT:
            raise ValueError(f"seed must be an integer in [0, 2**64 - 1], got {seed!r}")
        if eligible is not None and not callable(eligible):
            raise TypeError(f"eligible must be callable, got {type(eligible).__name__}")
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        self._policy = labels if isinstance(labels, LabelPolicy) else LabelPolicy(labels)
        if p is None and not given:
            p = 0.5
        chances = chances_of(p, self._policy)
        first = chances(0) if callable(chances) else chances
        if insertion == "graft" and first.get(self._policy.normal, 0) > 0:
            raise ValueError(f"p must not name {self._policy.normal!r} with insertion='graft', which adds nodules only")
        if not callable(sampling_strategy):  # words, numbers and classes can be checked before there are counts
            added_counts({}, self._policy, n_synthetic=n_synthetic, sampling_strategy=sampling_strategy)

        self.p = p
        self.n_synthetic, self.sampling_strategy = n_synthetic, sampling_strategy
        self.insertion, self.placement, self.seed = insertion, check_placement(placement), seed
        self.strength = check_strength(strength)
        self.eligible, self.layout = eligible, layout
        self.value_range = ValueRange.of(value_range)
        self._gates = None if gate is None else Gates(gate)
        self.pool = pool
        # Held in a tuple: a module attribute would make the generator part of a user's model.
        self._held = (generator, prior)
        self._renderer = Renderer(generator, device=device, dtype=dtype, batch_size=render_batch_size, compile=compile)
        self._hash: str | None = None
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._enabled = torch.ones((), dtype=torch.bool).share_memory_()
        self._step = 0
        self.last_params: MixParams | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        prior: LocationPrior | None = None,
        **options: Any,
    ) -> "SyntheticNoduleMix":
        """Gives a mix with trained weights and a fitted prior.

        Args:
            name_or_path: a folder (of a `ClassGenerator` too) or a hub id; None: the weights of `pool` if there is one,
                else the bundled ones.
            revision: of the hub repository.
            local_files_only: never ask the hub.
            cache_dir: of the hub's files.
            token: of the hub.
            prior: in place of the prior beside the weights.
            options: what `SyntheticNoduleMix` takes.

        Raises:
            WeightsError: weights that are missing, damaged or not ours, or no prior beside them and none given.
            PriorError: a damaged prior.
        """
        if isinstance(options.get("pool"), SyntheticPool) and name_or_path is None:
            return cls(options["pool"].generator, prior or options["pool"].prior, **options)
        where: Any = dict(revision=revision, local_files_only=local_files_only, cache_dir=cache_dir, token=token)
        generator: Generator
        if name_or_path is not None and ClassGenerator.is_at(name_or_path):
            generator = ClassGenerator.from_pretrained(name_or_path)
        else:
            generator = NoduleGenerator.from_pretrained(name_or_path, **where)
        if prior is None:
            prior = LocationPrior.load(fetch(name_or_path, PRIOR, **where))
        return cls(generator, prior, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes the generator and the prior where `from_pretrained` finds both; p, seed and the rest are the caller's.

        Args:
            save_directory: made if missing.
            options: what `NoduleGenerator.save_pretrained` takes.

        Returns:
            The commit's address if it was pushed to the hub.
        """
        if not hasattr(self.generator, "save_pretrained"):
            raise TypeError(f"generator must be one with weights to be saved, got {type(self.generator).__name__}")
        return self.generator.save_pretrained(save_directory, prior=self.prior, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the generator and the prior, for `from_pretrained(repo_id)`; gives the commit's address.

        Args:
            repo_id: such as "user/name"; made if missing.
            options: what `NoduleGenerator.push_to_hub` takes: commit_message, private, token, branch, ...
        """
        if not hasattr(self.generator, "push_to_hub"):
            raise TypeError(f"generator must be a NoduleGenerator to be pushed, got {type(self.generator).__name__}")
        return self.generator.push_to_hub(repo_id, prior=self.prior, **options)

    @property
    def generator(self) -> Any:
        """The generator, as it was given; not a submodule."""
        return self._held[0]

    @property
    def prior(self) -> LocationPrior:
        """The location prior."""
        return self._held[1]

    @property
    def enabled(self) -> bool:
        """Whether anything is mixed; workers that are alive see a change."""
        return bool(self._enabled)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled.fill_(bool(value))

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the generator's tensors, taken once."""
        if self._hash is None:
            self._hash = self.generator.weights_hash
        return self._hash

    @property
    def _planner(self) -> Planner:
        return Planner(
            self.prior,
            seed=self.seed,
            nodule=self._policy.nodule,
            chances=chances_of(self.p, self._policy),
            strength=self.strength,
        )

    def _filler(self, insertion: str) -> Filler:
        return Filler(
            self._renderer,
            self.value_range,
            insertion=insertion,
            placement=self.placement,
            gates=self._gates,
            weights_hash=self.weights_hash,
            pool=self.pool,
        )

    # --- A and B ---
    def wrap(self, dataset: Dataset) -> MixedDataset:
        """Gives a data set like any other whose items are mixed (B), generated one by one where they are read.

        Args:
            dataset: map-style; items are tuples or dicts of an image (C, H, W) and a label, and anything else.
        """
        return MixedDataset(self._planned(dataset, self._epoch), self._filler(self.insertion))

    def loader(self, dataset: Dataset, batch_size: int | None = 1, **options: Any) -> MixLoader:
        """Gives a loader of mixed batches (A): planned in the workers, generated in this process on `device`.

        Args:
            dataset: as for `wrap`, or what `wrap` gave.
            batch_size: samples of a batch.
            options: what a DataLoader takes.
        """
        epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        planned = self._planned(dataset, epoch)
        return MixLoader(
            planned, self._filler(self.insertion), on_batch=self._remember, batch_size=batch_size, **options
        )

    def gate_report(self) -> dict[str, Any]:
        """Gives what the gate has done so far; see `carim_aug.transforms.gate.Gates.report`.

        Raises:
            ValueError: the mix has no gate.
        """
        if self._gates is None:
            raise ValueError("gate must be given to have a report, got None")
        return self._gates.report()

    def class_counts(self, dataset: Dataset) -> dict[str, dict[str, int]]:
        """Gives real, synthetic and total samples per class, before training; see `PlannedDataset.class_counts`."""
        return self._planned(dataset, self._epoch).class_counts()

    def _planned(self, dataset: Dataset, epoch: Tensor) -> PlannedDataset:
        if isinstance(dataset, MixedDataset):
            if dataset.planned.enabled is self._enabled:  # wrapped by this mix: labels are read already
                return dataset.planned.with_epoch(epoch)
            dataset = dataset.dataset
        planned = PlannedDataset(
            dataset,
            self.prior,
            seed=self.seed,
            p=self.p,
            policy=self._policy,
            layout=self.layout,
            insertion=self.insertion,
            strength=self.strength,
            eligible=self.eligible,
            n_synthetic=self.n_synthetic,
            sampling_strategy=self.sampling_strategy,
            epoch=epoch,
            enabled=self._enabled,
        )
        self._check_places(planned.policy)
        return planned

    def _check_places(self, policy: LabelPolicy) -> None:
        if policy.kind == "detection" and not places_nodules(self.generator):
            raise ValueError(
                f"labels must have no boxes with a {type(self.generator).__name__}, which does not put the nodule "
                "where the mask is, got detection targets"
            )

    def _remember(self, params: MixParams) -> None:
        self.last_params = params

    # --- C ---
    def make_params(self, flat_inputs: list[Any]) -> MixParams:  # type: ignore[override]
        """Decides for one batch: every random draw of the transform, keyed by (seed, epoch, images seen).

        Args:
            flat_inputs: images (B, C, H, W) or B of them, and labels (B,) or (B, C) or B detection targets.
        """
        images, labels = flat_inputs
        policy, planner = self._policy.resolve(labels, batch=True), self._planner
        if self.eligible is not None:
            allowed = [bool(self.eligible(label)) for label in labels]
        elif takes_anything(policy, self.insertion):
            allowed = [True] * len(labels)
        else:
            allowed = [name == policy.normal for name in policy.classes_of(labels)]
        # Each rank and each worker counts its own steps, so their keys must differ.
        worker, rank = get_worker_info(), _rank()
        more = (() if rank == 0 else (rank,)) if worker is None else (rank, worker.seed)
        epoch, start = int(self._epoch), self._step
        slots = tuple(
            planner.decide((self.seed, epoch, start + i, *more), i, eligible=ok) for i, ok in enumerate(allowed)
        )
        self._step += len(slots)
        settled = self._filler(self.insertion).settle(images, slots, planner)
        sizes = sizes_of(images)
        several = None if isinstance(images, Tensor) else sizes
        return MixParams(settled.slots, self.insertion, sizes[0], self.weights_hash, sizes=several)

    def forward(self, *inputs: Any, params: MixParams | None = None) -> Any:
        """Mixes a batch.

        Args:
            *inputs: images and labels, and anything more; or one tuple, list or dict that holds them.
            params: decisions to do again, such as `last_params`; drawn by default.

        Returns:
            The same structure, with new images and labels where anything is synthetic.

        Raises:
            ValueError: images or labels that break their rules.
            TypeError: no image or label where the layout says.
        """
        if not inputs:
            raise TypeError("inputs must be images and labels, or one tuple, list or dict that holds them, got none")
        if not isinstance(params, MixParams | None):
            raise TypeError(f"params must be MixParams such as last_params, got {type(params).__name__}")
        sample = inputs if len(inputs) > 1 else inputs[0]
        if not self.enabled:
            return sample
        if self.n_synthetic is not None or self.sampling_strategy is not None:
            raise ValueError(
                "n_synthetic and sampling_strategy add samples to a data set: use mix.loader(dataset, ...) or "
                "mix.wrap(dataset); for mix(images, labels) give p"
            )
        layout = Layout.of(sample, self.layout)
        images, labels = layout.get(sample)
        check_images(images, batch=True)
        pixels = plain_images(images)
        self.value_range.check_each(pixels)
        check_order(self._policy, layout, labels)
        policy = self._policy.resolve(labels, batch=True)
        self._check_places(policy)
        policy.check(labels, sizes=sizes_of(pixels))
        if len(labels) != len(pixels):
            raise ValueError(f"labels must be as many as images ({len(pixels)}), got {len(labels)}")
        if params is None:
            params = self.make_params([pixels, labels])
        elif len(params.slots) != len(pixels):
            raise ValueError(f"params must be of {len(pixels)} slots, got {len(params.slots)}")
        filler = self._filler(params.insertion)
        mixed, marked, self.last_params = filler.fill(pixels, labels, Settled(params.slots, {}), policy)
        return sample if mixed is pixels else layout.put(sample, mixed, marked)

    # --- Provenance and state ---
    def regenerate(self, key: tuple[int, ...], class_name: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Gives a synthetic image again from its key alone.

        Args:
            key: (seed, epoch, index), as `MixParams.keys` has it.
            class_name: of the slot; None: the nodule class.

        Returns:
            image (1, S, S) float32 in [-1, 1]; mask (1, S, S) in {0, 1}; boxes (k, 4) XYXY in pixels of S.
        """
        name = self._policy.nodule if class_name is None else self._policy.name_of(class_name)
        if len(key) < 3:
            raise ValueError(f"key must be (seed, epoch, index) or longer, got {key}")
        if not self._policy.can_make(name):
            raise ValueError(f"class_name must be one that the generator makes, got {class_name!r}")
        slot = self._planner.regenerate(tuple(key), name)
        size = self.generator.image_size
        boxes = slot.boxes_at(size, size)
        image = self._renderer.whole([slot], torch.device("cpu"))[0]
        return image, boxes_to_masks([boxes], size)[0], boxes

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of `mix(images, labels)` and of all `mix.wrap(...)` data sets; the step goes back to 0."""
        self._epoch.fill_(check_epoch(epoch))
        self._step = 0

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Gives seed, epoch and step (images seen by `mix(images, labels)` in this epoch).

        As a part of a larger module it adds nothing to that module's state.
        """
        if destination is not None or args:
            return destination
        return {"seed": self.seed, "epoch": int(self._epoch), "step": self._step}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Goes on from a state of the same seed.

        Raises:
            ValueError: a state of another seed, or no such state.
        """
        epoch, step = check_state(state_dict, self.seed)
        self.set_epoch(epoch)
        self._step = step

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Shares epoch and switch with workers again: a copy's memory is its own."""
        super().__setstate__(state)
        self._epoch.share_memory_()
        self._enabled.share_memory_()

    def extra_repr(self) -> str:
        """Gives the settings that decide."""
        how = {"p": self.p, "n_synthetic": self.n_synthetic, "sampling_strategy": self.sampling_strategy}
        shown = {k: v for k, v in how.items() if v is not None} | {"insertion": self.insertion, "seed": self.seed}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())


def _rank() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
