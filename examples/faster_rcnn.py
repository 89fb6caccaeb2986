"""torchvision's Faster R-CNN on nodule boxes, with nodules grafted into the images.

    python examples/faster_rcnn.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Prints the losses, and how many of the validation nodules the best box of each image finds.
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


def collate(samples):
    return tuple(zip(*samples, strict=True))


# The mix finds the nodule's label by the data set's classes, 6 in ChestX-ray14; where there are none, it is 1.
transform = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:
    options = {"target": "detection", "only_normal_or_boxed": True, "transform": transform}
    train = ChestXray14(args.data, split="train", **options)
    val = ChestXray14(args.data, split="val", **options)
else:
    train = PhantomChest(200, nodule_fraction=0.3, seed=200, target="detection", transform=transform)
    val = PhantomChest(50, nodule_fraction=0.3, seed=50, target="detection", transform=transform)

mix = SyntheticNoduleMix.from_pretrained(args.weights, p=0.3)
train_loader = mix.loader(train, batch_size=4, shuffle=True, collate_fn=collate)
val_loader = DataLoader(val, batch_size=4, collate_fn=collate)
assert_real_only(val_loader)

model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=15, min_size=args.size)
optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9)
for epoch in range(args.epochs):
    model.train()
    for images, targets in islice(train_loader, args.batches):
        losses = model([image.expand(3, -1, -1) for image in images], targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    print(f"epoch {epoch}: " + ", ".join(f"{name} {float(loss.detach()):.3f}" for name, loss in losses.items()))

model.eval()
found = nodules = checked = 0
for images, targets in islice(val_loader, args.batches):
    with torch.no_grad():
        predictions = model([image.expand(3, -1, -1) for image in images])
    for target, prediction in zip(targets, predictions, strict=True):
        best = prediction["boxes"][:1]
        found += int((box_iou(target["boxes"], best) > 0.2).any(dim=1).sum())
        nodules += len(target["boxes"])
        checked += 1
print(f"one box an image finds {found} of {nodules} nodules in {checked} real images")
