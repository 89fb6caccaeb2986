"""The main job in a minute, on drawn phantoms: counts, mixed loader, a few training steps, a picture."""

import time
from collections import Counter
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from carim_aug.data.phantom import PhantomChest
from carim_aug.ops.boxes import boxes_to_masks
from carim_aug.ops.random import fold
from carim_aug.tools.plots import batch_sheet, contact_sheet, save_picture, stack_pictures
from carim_aug.transforms.mix import SyntheticNoduleMix

SIZE, BATCH = 128, 32


def run_demo(mix: SyntheticNoduleMix, out: Path, *, batches: int, device: str) -> None:
    """Train a small classifier on phantoms with nodules grafted in; print what happened, draw it to out/demo.png.

    The mix has `p`; its seed is the classifier's and the phantoms' too. A batch has 32 images.
    """
    started = time.perf_counter()
    dataset = PhantomChest(240, size=SIZE, nodule_fraction=0.1, seed=mix.seed)
    names = ("No Finding", "Nodule")
    real = Counter(names[label] for label in dataset.targets)
    print(f"Data: {len(dataset)} drawn phantoms of a chest, not X-rays: this shows how it works, not how well.")
    print(f"\n{'class':<12}{'real':>8}{'synthetic':>12}{'after':>8}   (real: phantoms here; synthetic: grafts)")
    for name, row in mix.class_counts(dataset).items():
        print(f"{name:<12}{real[name]:>8}{row['synthetic']:>12}{row['total']:>8}")

    # Train.
    loader = mix.loader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(mix.seed))
        for before, after in ((1, 8), (8, 16), (16, 32)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 2)]
    classifier = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    losses: list[float] = []
    made = 0
    epochs = chain.from_iterable(repeat(loader))
    bar = tqdm(islice(epochs, batches), total=batches, unit="batch", desc="training")
    for images, labels in bar:
        loss = F.cross_entropy(classifier(images.to(device).float() / 255), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        params: Any = loader.last_params
        made += int(params.synthetic.sum())
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")

    # Draw and tell.
    path = out / "demo.png"
    sheet = contact_sheet(mix, seed=mix.seed, n=4)
    save_picture(stack_pictures(sheet, batch_sheet(images, params, size=sheet.width // 11 - 4, per_row=11)), path)
    rate = _images_per_second(mix.generator, device)
    first, last = np.mean(losses[:4]), np.mean(losses[-4:])
    print(f"\nTrained {len(losses)} batches of {BATCH}; {made} of the images in them had a synthetic nodule.")
    print(f"Loss, mean of four batches: first {first:.3f}, last {last:.3f}.")
    print(f"Generation alone: {rate:.0f} images/s of {mix.generator.image_size} px on {device}.")
    print(f"Picture: {path}")
    print(f"Done in {time.perf_counter() - started:.0f} s.")


def _images_per_second(generator: Any, device: str) -> float:
    """Return the residuals that are generated a second in batches of 32, after one to warm up."""
    size, seeds = generator.image_size, range(BATCH)
    masks = boxes_to_masks([torch.tensor([[0.3, 0.4, 0.4, 0.5]]) * size] * BATCH, size).to(device)
    regions = torch.zeros_like(masks)
    generator.residuals(regions, masks, seeds).cpu()
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < 1:
        generator.residuals(regions, masks, seeds).cpu()  # which waits for the device
        done += BATCH
    return done / (time.perf_counter() - started)
