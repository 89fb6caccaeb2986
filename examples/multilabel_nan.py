"""A multi-label DenseNet-121 on 14 findings, some of them not annotated (NaN), with nodules grafted in.

    python examples/multilabel_nan.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Every other image plays a collection that was read for nodules alone. The loss counts annotated entries only.
"""

import argparse
from itertools import islice

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.models import densenet121
from torchvision.transforms import v2

from carim_aug import SyntheticNoduleMix
from carim_aug.data import FINDINGS, ChestXray14, PhantomChest

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="folder in ChestX-ray14's layout")
parser.add_argument("--weights", help="folder or hub id; default: the bundled weights")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--batches", type=int, help="stop after so many")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

transform = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:
    train = ChestXray14(args.data, split="train", transform=transform)
else:
    train = PhantomChest(400, target="multilabel", transform=transform)

not_annotated = [finding != "Nodule" for finding in FINDINGS]
for label in train.targets[1::2]:
    label[not_annotated] = torch.nan

# A graft sets Nodule; entries that are not annotated stay NaN.
mix = SyntheticNoduleMix.from_pretrained(args.weights, p=0.3, device=device)
loader = mix.loader(train, batch_size=16, shuffle=True)

torch.manual_seed(0)
model = densenet121(num_classes=len(FINDINGS)).to(device)
optimizer = torch.optim.Adam(model.parameters(), 1e-4)
for images, labels in islice(loader, args.batches):
    logits = model(images.to(device).expand(-1, 3, -1, -1))
    labels = labels.to(device)
    known = ~labels.isnan()
    loss = binary_cross_entropy_with_logits(logits[known], labels[known])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    grafted = int(loader.last_params.synthetic.sum())
    print(f"loss {loss.item():.3f}; {grafted} grafted nodules, {int(known.sum())} of {known.numel()} entries annotated")
