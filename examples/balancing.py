"""The balancing experiments of Ann (2021), DS1 to DS4, and the control that any gain must beat: duplicated images.

    python examples/balancing.py --data FOLDER --full runs/stage2/export      # without --data: drawn phantoms

Prints one AUC a data set, of one short run each. `python -m train.reproduction.table2` has seeds, intervals and more
controls.
"""

import argparse
from itertools import islice

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from torchvision.models import resnet18
from torchvision.transforms import v2

from carim_aug import SyntheticNoduleMix, assert_real_only
from carim_aug.data import ChestXray14, PhantomChest

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="folder in ChestX-ray14's layout")
parser.add_argument("--weights", help="DS3: trained without the CARIM loss; default: the bundled weights")
parser.add_argument("--full", help="DS4: the full model; default: the bundled weights, which are no such")
parser.add_argument("--size", type=int, default=128)
parser.add_argument("--batches", type=int, default=50, help="shown to each")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def forever(loader):
    while True:
        yield from loader


def train_classifier(loader):
    torch.manual_seed(0)  # one start for all
    model = resnet18(num_classes=2).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    for images, labels in islice(forever(loader), args.batches):
        logits = model(images.to(device).expand(-1, 3, -1, -1))
        loss = cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def measure_auc(model, loader):
    scores, truth = [], []
    for images, labels in loader:
        logits = model(images.to(device).expand(-1, 3, -1, -1))
        scores.append(logits[:, 1].cpu())
        truth.append(labels)
    scores, truth = torch.cat(scores), torch.cat(truth)
    return (scores[truth == 1][:, None] > scores[truth == 0]).float().mean()


transform = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:
    options = {"target": "nodule", "only_normal_or_nodule": True, "transform": transform}
    train = ChestXray14(args.data, split="train", **options)
    val = ChestXray14(args.data, split="val", **options)
else:
    train = PhantomChest(200, nodule_fraction=0.2, seed=200, transform=transform)
    val = PhantomChest(60, nodule_fraction=0.2, seed=60, transform=transform)

# DS1 is all real images; DS2 as many normal ones as there are with nodules; the control repeats some of its images.
targets = torch.tensor(train.targets)
nodule = torch.nonzero(targets == 1)[:, 0].tolist()
normal = torch.nonzero(targets == 0)[:, 0]
normal = normal[torch.randperm(len(normal), generator=torch.Generator().manual_seed(0))].tolist()
n = round(len(nodule) * 2000 / 5698)  # Ann's share of synthetic nodules
balanced = Subset(train, nodule + normal[: len(nodule)])
duplicates = Subset(train, nodule + nodule[:n] + normal[: len(nodule) + n])

# DS3 and DS4 add whole generated images of both classes to DS2.
added = {"Nodule": n, "No Finding": n}
without_loss = SyntheticNoduleMix.from_pretrained(args.weights, n_synthetic=added, insertion="whole", device=device)
full_model = SyntheticNoduleMix.from_pretrained(
    args.full or args.weights, n_synthetic=added, insertion="whole", device=device
)

options = {"batch_size": 16, "shuffle": True, "drop_last": True}
loaders = {
    "DS1": DataLoader(train, **options),
    "DS2": DataLoader(balanced, **options),
    "DS2 + duplicates": DataLoader(duplicates, **options),
    "DS3": without_loss.loader(balanced, **options),
    "DS4": full_model.loader(balanced, **options),
}
val_loader = DataLoader(val, batch_size=32)
assert_real_only(val_loader)
for name, loader in loaders.items():
    auc = measure_auc(train_classifier(loader), val_loader)
    print(f"{name}: {len(loader.dataset)} images, AUC on {len(val)} real ones {auc:.3f}", flush=True)
