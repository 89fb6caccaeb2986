"""A DenseNet-121 nodule classifier with nodules grafted into its training images, and its labels: `mix.loader`.

    python examples/classifier_loader.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Prints real and synthetic images of each class, the loss of each epoch and the AUC on real validation images.
"""

import argparse
from itertools import islice

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.models import densenet121
from torchvision.transforms import v2

from carim_aug import LabelPolicy, SyntheticNoduleMix, assert_real_only
from carim_aug.data import ChestXray14, PhantomChest

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="folder in ChestX-ray14's layout")
parser.add_argument("--weights", help="folder or hub id; default: the bundled weights")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batches", type=int, help="stop each epoch, and validation, after so many")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

transform = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:
    options = {"target": "nodule", "only_normal_or_nodule": True, "transform": transform}
    train = ChestXray14(args.data, split="train", **options)
    val = ChestXray14(args.data, split="val", **options)
else:
    train = PhantomChest(400, nodule_fraction=0.2, seed=400, transform=transform)
    val = PhantomChest(100, nodule_fraction=0.2, seed=100, transform=transform)

# 100 images more: normal ones of the data set with a nodule in each, in other places in every epoch.
mix = SyntheticNoduleMix.from_pretrained(
    args.weights,
    n_synthetic={"Nodule": 100},
    labels=LabelPolicy("integer", classes=("No Finding", "Nodule")),  # what labels 0 and 1 mean
    device=device,
)
print(mix.class_counts(train))
train_loader = mix.loader(train, batch_size=16, shuffle=True)
val_loader = DataLoader(val, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))
assert_real_only(val_loader)

torch.manual_seed(0)
model = densenet121(num_classes=2).to(device)
optimizer = torch.optim.Adam(model.parameters(), 1e-4)
for epoch in range(args.epochs):
    model.train()
    for images, labels in islice(train_loader, args.batches):
        logits = model(images.to(device).expand(-1, 3, -1, -1))
        loss = cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    scores, truth = [], []
    for images, labels in islice(val_loader, args.batches):
        with torch.no_grad():
            logits = model(images.to(device).expand(-1, 3, -1, -1))
        scores.append(logits[:, 1].cpu())
        truth.append(labels)
    scores, truth = torch.cat(scores), torch.cat(truth)
    auc = (scores[truth == 1][:, None] > scores[truth == 0]).float().mean()
    print(f"epoch {epoch}: loss {loss.item():.3f}, AUC on {len(truth)} images without synthetic ones {auc:.3f}")
