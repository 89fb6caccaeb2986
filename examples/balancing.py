"""The balancing experiments of the source, DS1 to DS4, and the control that any gain must beat: duplicated real films.

    python examples/balancing.py --data FOLDER --full runs/stage2/export      # without --data: drawn phantoms

Prints one AUC a data set, of one short run each: seeds, intervals and more controls are in `train.reproduction.table2.training`.
"""

import argparse
from itertools import islice

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from torchvision.models import densenet121
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

shape = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:
    options = {"target": "nodule", "only_normal_or_nodule": True, "transform": shape}
    train, val = (ChestXray14(args.data, split=split, **options) for split in ("train", "val"))
else:
    train, val = (PhantomChest(n, nodule_fraction=0.2, seed=n, transform=shape) for n in (200, 60))
nodule, normal = ((torch.tensor(train.targets) == label).nonzero()[:, 0] for label in (1, 0))
normal = normal[torch.randperm(len(normal), generator=torch.Generator().manual_seed(0))]
n = round(len(nodule) * 2000 / 5698)  # the source's share of synthetic nodules
balanced = Subset(train, [*nodule.tolist(), *normal[: len(nodule)].tolist()])
more = [*nodule.tolist(), *nodule[:n].tolist(), *normal[: len(nodule) + n].tolist()]
both = {"Nodule": n, "No Finding": n}
models = {"DS3": args.weights, "DS4": args.full or args.weights}
mixes = {k: SyntheticNoduleMix.from_pretrained(w, n_synthetic=both, device=device) for k, w in models.items()}
sets = {"DS1": train, "DS2": balanced, "DS2 + duplicates": Subset(train, more), **dict.fromkeys(mixes, balanced)}
val_loader = DataLoader(val, batch_size=32)
assert_real_only(val_loader)
for name, films in sets.items():
    options = {"batch_size": 16, "shuffle": True, "drop_last": True}
    loader = mixes[name].loader(films, **options) if name in mixes else DataLoader(films, **options)
    torch.manual_seed(0)  # one start for all
    model = densenet121(num_classes=2).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    endless = (batch for _ in iter(int, 1) for batch in loader)
    for images, labels in islice(endless, args.batches):
        loss = cross_entropy(model(images.to(device).expand(-1, 3, -1, -1)), labels.to(device))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    with torch.no_grad():
        judged = [(model.eval()(x.to(device).expand(-1, 3, -1, -1)).cpu(), y) for x, y in val_loader]
    scores, truth = (torch.cat(part) for part in zip(*judged, strict=True))
    area = (scores[truth == 1, 1][:, None] > scores[truth == 0, 1]).float().mean()
    print(f"{name}: {len(loader.dataset)} films, AUC on {len(truth)} real ones {area:.3f}", flush=True)
