"""A DenseNet-121 nodule classifier with synthetic images of both classes in its training loader: `mix.loader`.

    python examples/classifier_loader.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Prints the loss of each epoch and the AUC on real validation images.
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

shape = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:
    options = {"target": "nodule", "only_normal_or_nodule": True, "transform": shape}
    train, val = (ChestXray14(args.data, split=split, **options) for split in ("train", "val"))
else:
    train, val = (PhantomChest(n, nodule_fraction=0.2, seed=n, transform=shape) for n in (400, 100))

# Both classes are added: with synthetic nodules alone the classifier would learn 'generated texture = nodule'.
added = {"Nodule": 200, "No Finding": 200}
meaning = LabelPolicy("integer", classes=("No Finding", "Nodule"))  # of labels 0 and 1
mix = SyntheticNoduleMix.from_pretrained(args.weights, n_synthetic=added, labels=meaning, device=device)
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
        loss = cross_entropy(model(images.to(device).expand(-1, 3, -1, -1)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        judged = [(model(x.to(device).expand(-1, 3, -1, -1)), y) for x, y in islice(val_loader, args.batches)]
    scores, truth = torch.cat([logits[:, 1].cpu() for logits, _ in judged]), torch.cat([y for _, y in judged])
    auc = (scores[truth == 1][:, None] > scores[truth == 0]).float().mean()
    print(f"epoch {epoch}: loss {loss.item():.3f}, AUC on {len(truth)} images without synthetic ones {auc:.3f}")
