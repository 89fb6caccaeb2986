"""torchvision's Faster R-CNN on nodule boxes, with grafted nodules in the films that have none.

    python examples/faster_rcnn.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Prints the losses, and how many of the validation nodules are found at one false box a film.
"""

import argparse
from itertools import islice

import torch
from torch.utils.data import DataLoader
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import box_iou
from torchvision.transforms import v2

from carim_aug import SyntheticNoduleMix, assert_real_only
from carim_aug.data import ChestXray14, PhantomChest

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="folder in ChestX-ray14's layout")
parser.add_argument("--weights", help="folder or hub id; default: the bundled weights")
parser.add_argument("--size", type=int, default=320)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batches", type=int, help="stop each epoch, and validation, after so many")
args = parser.parse_args()

shape = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:  # label 6 is a nodule there, as the data set's classes say
    options = {"target": "detection", "only_normal_or_boxed": True, "transform": shape}
    train, val = (ChestXray14(args.data, split=split, **options) for split in ("train", "val"))
else:
    train, val = (PhantomChest(n, nodule_fraction=0.3, seed=n, target="detection", transform=shape) for n in (200, 50))

mix = SyntheticNoduleMix.from_pretrained(args.weights, insertion="graft", p=0.3)
loader = mix.loader(train, batch_size=4, shuffle=True)  # lists of images and targets, as torchvision's detectors want
val_loader = DataLoader(val, batch_size=4, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
assert_real_only(val_loader)

model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=15, min_size=args.size)
optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9)
for epoch in range(args.epochs):
    model.train()
    for images, targets in islice(loader, args.batches):
        losses = model([image.expand(3, -1, -1) for image in images], targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    print(f"epoch {epoch}: " + ", ".join(f"{name} {float(loss.detach()):.3f}" for name, loss in losses.items()))

model.eval()
found = boxes = films = 0
for images, targets in islice(val_loader, args.batches):
    with torch.no_grad():
        guesses = model([image.expand(3, -1, -1) for image in images])
    for target, guess in zip(targets, guesses, strict=True):
        found += int((box_iou(target["boxes"], guess["boxes"][:1]) > 0.2).any(1).sum())
        boxes, films = boxes + len(target["boxes"]), films + 1
print(f"one box a film finds {found} of {boxes} nodules in {films} real films")
