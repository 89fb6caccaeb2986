"""`SyntheticNoduleMix`: synthetic lung nodules in a training loop's batches, used as v2.CutMix is."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2

from carim_aug.generators.base import check_source
from carim_aug.generators.pretrained import NoduleGenerator
from carim_aug.generators.weights import PRIOR, fetch
from carim_aug.labels.policy import LabelPolicy
from carim_aug.labels.sample import check_images, plain_images
from carim_aug.location.placement import Placement
from carim_aug.location.prior import LocationPrior
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.precision import compute_dtype
from carim_aug.ops.value_range import ValueRange
from carim_aug.transforms.amounts import Amount
from carim_aug.transforms.apply import Applier, Images, Placed, sizes_of
from carim_aug.transforms.dataset import MixedDataset, PlannedDataset
from carim_aug.transforms.gate import Gates
from carim_aug.transforms.loader import MixLoader
from carim_aug.transforms.plan import MixParams, check_epoch, check_state
from carim_aug.transforms.settings import Graft, MixSettings

FIXED = {"n_synthetic", "sampling_strategy", "insertion", "placement", "strength", "gate", "labels", "layout"}
FIXED |= {"labels_getter", "value_range", "eligible"}


class SyntheticNoduleMix(v2.Transform):
    """Grafts generated nodules into real chest X-rays, or replaces them by generated ones, in batches.

    Three uses, which decide alike for the same seed, epoch and index (A and B), with any number of workers, batch size,
    order or rank::

        for images, labels in mix.loader(dataset, batch_size=64, shuffle=True, num_workers=8): ...  # A
        loader = DataLoader(mix.wrap(dataset), batch_size=64)                                        # B
        images, labels = mix(images, labels)                                                         # C

    Args:
        generator: of nodules: a `NoduleGenerator`, or anything with `residuals` (for grafts) or `images` (for whole
            images), see `carim_aug.generators.base`.
        prior: where nodules are drawn: a `LocationPrior` or `RestrictedPrior`.
        p: chance that an eligible image becomes a synthetic nodule, in [0, 1]; or a dict from class to chance (with
            whole images normal ones too); or a function from the epoch to either. Default 0.5 where neither this nor
            the next two are given.
        n_synthetic: class to number of samples ADDED to the data set (A and B).
        sampling_strategy: imbalanced-learn's words, a ratio, a dict of TOTALS or a callable (A and B); see
            `carim_aug.transforms.amounts.Amount`.
        insertion: "graft": the real image stays and gets background + feather x residual. "whole": a generated image
            takes its place, as in Ann (2021).
        placement: of grafts: "lungs" looks at each image and draws a place outside its lungs again two times in three,
            about as real nodules lie (`carim_aug.location.placement`); "prior" takes the first draw, unseen; a function
            from an image (1, C, H, W) to a mask (1, 1, h, w) keeps nodules in your own masks.
        strength: of grafts: their residual times this, in (0, 4], or (least, most) to draw from; below 1 for subtler
            nodules. What came of it is in `last_params.contrasts`.
        gate: which nodules are good enough: a function, a `carim_aug.transforms.gate.Gate`, or a list of them. Rejected
            ones are drawn again; `gate_report()` counts.
        labels: a `LabelPolicy`, or its kind; "auto" reads the first labels seen.
        layout: where image and label sit in a sample: "auto", or a pair of keys or positions.
        labels_getter: in place of `layout`, as torchvision's transforms take it: a function from a sample to its label.
        value_range: of the images: "auto" (uint8: [0, 255]; float: [0, 1]), "imagenet", "symmetric" ([-1, 1]), "xrv"
            ([-1024, 1024]), (low, high), or {"mean": ..., "std": ...}.
        eligible: which real labels may be replaced; by default those of the majority class, No Finding in C; all where
            boxes are grafted in.
        seed: of all decisions, 0 to 2**64 - 1.
        device: where to generate; None: where the images are.
        dtype: of the generator's arithmetic: torch.float32 (default), torch.bfloat16, or "auto": bfloat16 where the
            hardware has it.
        render_batch_size: images of one generator call; of a generator that has `configure`, as the next one too.
        compile: put the generator through torch.compile.

    Raises:
        ValueError: a number or name that breaks its rule.
        TypeError: no generator or prior.
    """

    def __init__(
        self,
        generator: Any,
        prior: Any,
        *,
        p: float | Mapping[str, float] | Callable[[int], Any] | None = None,
        n_synthetic: Mapping[str, int] | None = None,
        sampling_strategy: str | float | Mapping[str, int] | Callable[[Any], Any] | None = None,
        insertion: str = "graft",
        placement: Placement = "lungs",
        strength: float | tuple[float, float] = 1.0,
        gate: Any = None,
        labels: LabelPolicy | str = "auto",
        layout: Any = "auto",
        labels_getter: Callable[[Any], Any] | str | None = None,
        value_range: Any = "auto",
        eligible: Callable[[Any], bool] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        render_batch_size: int = 32,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.settings = MixSettings(
            prior=prior,
            seed=seed,
            amount=Amount(p, n_synthetic, sampling_strategy),
            insertion=insertion,
            graft=Graft(placement, strength, None if gate is None else Gates(gate)),
            labels=labels if isinstance(labels, LabelPolicy) else LabelPolicy(labels),
            layout=layout,
            labels_getter=labels_getter,
            value_range=ValueRange.of(value_range),
            eligible=eligible,
        )
        compute_dtype(dtype, "cpu")
        if isinstance(render_batch_size, bool) or not isinstance(render_batch_size, int) or render_batch_size < 1:
            raise ValueError(f"render_batch_size must be an integer of at least 1, got {render_batch_size!r}")
        source = check_source(generator, insertion)
        if hasattr(generator, "configure"):
            source = generator.configure(dtype=dtype, batch_size=render_batch_size, compile=compile)
        # In plain objects: a module attribute would make the generator part of a user's model.
        self._held = (generator,)
        self._applier = Applier(self.settings, source, device)
        self._hash: str | None = None
        self._epoch = torch.zeros(2, dtype=torch.int64).share_memory_()  # and how often it was set
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
        prior: Any = None,
        **options: Any,
    ) -> "SyntheticNoduleMix":
        """Return a mix with trained weights and a fitted prior.

        Args:
            name_or_path: a folder or a hub id; None: the bundled weights.
            revision, local_files_only, cache_dir, token: as Hugging Face's `from_pretrained` has them.
            prior: in place of the prior beside the weights.
            options: what `SyntheticNoduleMix` takes.

        Raises:
            WeightsError: weights that are missing, damaged or not ours, or no prior beside them and none given.
            PriorError: a damaged prior.
        """
        where: Any = dict(revision=revision, local_files_only=local_files_only, cache_dir=cache_dir, token=token)
        generator = NoduleGenerator.from_pretrained(name_or_path, **where)
        if prior is None:
            prior = LocationPrior.load(fetch(name_or_path, PRIOR, **where))
        return cls(generator, prior, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write generator and prior where `from_pretrained` finds both; see `NoduleGenerator.save_pretrained`."""
        return self._saveable().save_pretrained(save_directory, prior=self.prior, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload generator and prior and return the commit's address; see `NoduleGenerator.push_to_hub`."""
        return self._saveable().push_to_hub(repo_id, prior=self.prior, **options)

    def _saveable(self) -> Any:
        if not hasattr(self.generator, "save_pretrained"):
            raise TypeError(f"generator must be one with weights to be saved, got {type(self.generator).__name__}")
        return self.generator

    @property
    def generator(self) -> Any:
        """The generator, as it was given; not a submodule."""
        return self._held[0]

    @property
    def prior(self) -> Any:
        """The location prior."""
        return self.settings.prior

    @property
    def seed(self) -> int:
        """Of all decisions."""
        return self.settings.seed

    @property
    def p(self) -> Any:
        """The chance, as it was given, or None; a new one holds from the next batch or data set on."""
        return self.settings.amount.p

    @p.setter
    def p(self, p: Any) -> None:
        self.settings = replace(self.settings, amount=Amount(p))

    @property
    def enabled(self) -> bool:
        """Whether anything is mixed; workers that are alive see a change."""
        return bool(self._enabled)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled.fill_(bool(value))

    @property
    def synthetic_enabled(self) -> bool:
        """The same, by the name that `assert_real_only` looks for."""
        return self.enabled

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the generator's tensors, computed once."""
        if self._hash is None:
            self._hash = self.generator.weights_hash
        return self._hash

    # --- A and B ---
    def wrap(self, dataset: Dataset) -> MixedDataset:
        """Return a data set like any other whose items are mixed (B), generated one by one where they are read.

        Args:
            dataset: map-style; its samples hold an image (C, H, W) and a label, and anything else.
        """
        return MixedDataset(self._plan(dataset), self._applier, self)

    def loader(self, dataset: Dataset, batch_size: int | None = 1, **options: Any) -> MixLoader:
        """Return a loader of mixed batches (A): decided in the workers, generated in this process on `device`.

        Args:
            dataset: as for `wrap`, or what `wrap` returned.
            batch_size: as in a DataLoader, whose other `options` are taken too; see `MixLoader`.
            options: see there.
        """
        return MixLoader(self.wrap(dataset), batch_size=batch_size, **options)

    def left_real(self) -> dict[str, int]:
        """Return how many images were to get a nodule and stayed real, by reason; see `transforms.left_real`."""
        return self.settings.graft.left_real.report()

    def gate_report(self) -> dict[str, Any]:
        """Return what the gate has done so far; see `carim_aug.transforms.gate.Gates.report`."""
        gates = self.settings.graft.gates
        if gates is None:
            raise ValueError("gate must be given to have a report, got None")
        return gates.report()

    def class_counts(self, dataset: Dataset) -> dict[str, dict[str, int]]:
        """Return real, synthetic and total samples per class, before training; see `PlannedDataset.class_counts`."""
        return self._plan(dataset).class_counts()

    def _plan(self, dataset: Dataset) -> PlannedDataset:
        if isinstance(dataset, MixedDataset):
            if dataset.planned.enabled is self._enabled:  # wrapped by this mix: labels are read already
                return dataset.planned
            dataset = dataset.dataset
        planned = PlannedDataset(dataset, self.settings, epoch=self._epoch, enabled=self._enabled)
        self._applier.check_labels(planned.policy)
        return planned

    # --- C ---
    def make_params(self, flat_inputs: list[Any]) -> MixParams:  # type: ignore[override]
        """Decide for one batch of [images, labels], keyed by (seed, epoch, images seen); nothing else happens."""
        images, labels = flat_inputs
        policy = self.settings.labels.resolve(labels, batch=True)
        planner = self.settings.planner(policy)
        if self.settings.eligible is not None:
            eligible = [bool(self.settings.eligible(label)) for label in labels]
        elif self.settings.takes_anything(policy):
            eligible = [True] * len(labels)
        else:
            eligible = [name == policy.normal for name in policy.classes_of(labels)]
        # Each rank and each worker counts its own steps, so their keys must differ.
        worker, rank = get_worker_info(), _rank()
        more = (() if rank == 0 else (rank,)) if worker is None else (rank, worker.seed)
        keys = [(self.seed, int(self._epoch[0]), self._step + i, *more) for i in range(len(eligible))]
        decisions = tuple(planner.decide(key, i, eligible=eligible[i]) for i, key in enumerate(keys))
        return MixParams(decisions, self.settings.insertion, sizes_of(images), self.weights_hash, placed=False)

    def transform(self, images: Images, labels: Any, params: MixParams) -> tuple[Images, Any, MixParams]:  # type: ignore[override]
        """Apply decisions to a batch.

        Args:
            images: (B, C, H, W) or B images (C, H, W), in `value_range`. Never changed.
            labels: of them. Never changed.
            params: of `make_params`, or of an earlier batch.

        Returns:
            Images and labels, the given ones where nothing is synthetic, and the decisions as they were placed.

        Raises:
            ValueError: params of another number of images.
        """
        if len(params.decisions) != len(images):
            raise ValueError(f"params must be of {len(images)} images, got {len(params.decisions)}")
        policy, applier = self.settings.labels.resolve(labels, batch=True), self._applier
        if params.insertion != self.settings.insertion:
            # Chances decide nothing any more, and those of whole images are none of a graft.
            settings = replace(self.settings, insertion=params.insertion, amount=Amount(0.0))
            applier = Applier(settings, applier.source, applier.device)
        decisions = params.decisions
        if not params.placed:
            planner, taken = self.settings.planner(policy), policy.boxes_of(labels)
            decisions = applier.place(images, decisions, planner, taken).decisions
        # What a gate saw is generated again, all in one call: the same params then give the same pixels, bit for bit.
        return applier.apply(images, labels, Placed(decisions, {}), policy, self.weights_hash)

    def forward(self, *inputs: Any, params: MixParams | None = None) -> Any:
        """Mix a batch.

        Args:
            *inputs: images and labels, and anything more; or one tuple, list or dict that holds them.
            params: decisions to apply again, such as `last_params`; made by default.

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
        if self.settings.amount.adds:
            raise ValueError(
                "n_synthetic and sampling_strategy add samples to a data set: use mix.loader(dataset, ...) or "
                "mix.wrap(dataset); for mix(images, labels) give p"
            )

        # Check what comes in.
        layout = self.settings.layout_of(sample)
        images, labels = layout.get(sample)
        check_images(images, batch=True)
        pixels = plain_images(images)
        self.settings.value_range.check_each(pixels)
        policy = self.settings.labels.resolve(labels, batch=True)
        self._applier.check_labels(policy)
        self.settings.check_normal(policy)
        policy.check(labels, sizes=sizes_of(pixels))
        if len(labels) != len(pixels):
            raise ValueError(f"labels must be as many as images ({len(pixels)}), got {len(labels)}")

        # Decide, apply, count.
        again = params is not None
        params = params or self.make_params([pixels, labels])
        mixed, changed, self.last_params = self.transform(pixels, labels, params)
        self._step += 0 if again else len(pixels)
        return sample if mixed is pixels else layout.put(sample, mixed, changed)

    # --- Provenance and state ---
    def regenerate(self, key: tuple[int, ...], class_name: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return a whole synthetic image again from its key alone.

        Args:
            key: (seed, epoch, index), as `MixParams.keys` has it.
            class_name: of the image; None: the nodule class.

        Returns:
            image (1, S, S) float32 in [-1, 1]; mask (1, S, S) in {0, 1}; boxes (k, 4) XYXY in pixels of S.
        """
        labels = self.settings.labels
        name = labels.nodule if class_name is None else labels.name_of(class_name)
        if len(key) < 3:
            raise ValueError(f"key must be (seed, epoch, index) or longer, got {key}")
        if not labels.can_make(name):
            raise ValueError(f"class_name must be one that the generator makes, got {class_name!r}")
        size = check_source(self._applier.source, "whole").image_size
        decision = self.settings.planner(labels).regenerate(tuple(key), name)
        boxes = decision.boxes_at(size, size)
        device = self._applier.device or torch.device("cpu")
        return self._applier.whole_images([decision], device)[0].cpu(), boxes_to_masks([boxes], size)[0], boxes

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of `mix(images, labels)` and of all `mix.wrap(...)` data sets; the step goes back to 0."""
        self._epoch[0] = check_epoch(epoch)
        self._epoch[1] += 1
        self._step = 0

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Return seed, epoch and step (images seen by `mix(images, labels)` in this epoch).

        As a part of a larger module it adds nothing to that module's state.
        """
        if destination is not None or args:
            return destination
        return {"seed": self.seed, "epoch": int(self._epoch[0]), "step": self._step}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Go on from a state of the same seed; another state is a ValueError."""
        epoch, step = check_state(state_dict, self.seed)
        self.set_epoch(epoch)
        self._step = step

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED:  # it would be without effect
            raise AttributeError(f"{name} is fixed when a mix is made: make another, SyntheticNoduleMix({name}=...)")
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Share epoch and switch with workers again: a copy's memory is its own.
        super().__setstate__(state)
        self._epoch.share_memory_()
        self._enabled.share_memory_()

    def extra_repr(self) -> str:
        """Return the settings that decide."""
        shown = self.settings.amount.given | {"insertion": self.settings.insertion, "seed": self.seed}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())


def _rank() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
