"""Grafts written to disk once, then any training script: here a small classifier on the exported folder.

    python examples/export_then_train.py --data FOLDER      # ChestX-ray14's layout; without it: whole synthetic images

Prints what was written, that the guard refuses the folder as validation data, and the loss.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.models import resnet18
from torchvision.transforms import v2

from carim_aug import SyntheticDataError, SyntheticNoduleMix, assert_real_only
from carim_aug.data import ChestXray14, PhantomChest
from carim_aug.tools.export import export

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="folder in ChestX-ray14's layout")
parser.add_argument("--weights", help="folder or hub id; default: the bundled weights")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--n", type=int, default=40, help="nodules to write")
parser.add_argument("--batches", type=int, help="stop after so many")
args = parser.parse_args()

# Write the synthetic images; the same command again goes on where it was cut.
folder = Path(tempfile.mkdtemp()) / "synthetic"
mix = SyntheticNoduleMix.from_pretrained(args.weights)
if args.data:
    written = export(mix, folder, n=args.n, backgrounds=args.data, size=args.size)
else:
    written = export(mix, folder, n=args.n, negatives=args.n, size=args.size)
print(f"wrote {written['images']} images with {written['nodules']} nodules to {folder}")

# Read them as any folder in ChestX-ray14's layout, beside the real images.
transform = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
synthetic = ChestXray14(folder, split="train", target="nodule", transform=transform)
if args.data:
    real = ChestXray14(args.data, split="train", target="nodule", only_normal_or_nodule=True, transform=transform)
else:
    real = PhantomChest(80, nodule_fraction=0.2, transform=transform)
try:
    assert_real_only(synthetic)
except SyntheticDataError as error:
    print(f"not for validation: {type(error).__name__}")

torch.manual_seed(0)
loader = DataLoader(ConcatDataset([real, synthetic]), batch_size=16, shuffle=True)
model = resnet18(num_classes=2)
optimizer = torch.optim.Adam(model.parameters(), 1e-4)
for images, labels in islice(loader, args.batches):
    loss = cross_entropy(model(images.expand(-1, 3, -1, -1)), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f} on {len(real)} real and {len(synthetic)} synthetic images")
