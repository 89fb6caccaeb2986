"""torchxrayvision: 18 labels with NaN, images in [-1024, 1024], and tables that stay true when data sets are merged.

    python examples/torchxrayvision_multilabel.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Prints how many rows of the table have a nodule, real or grafted, and the loss.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torchxrayvision as xrv
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader
from torchvision.utils import save_image

from carim_aug import SyntheticNoduleMix
from carim_aug.data import PhantomChest
from carim_aug.integrations.torchxrayvision import MixDataset

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="folder in ChestX-ray14's layout")
parser.add_argument("--weights", help="folder or hub id; default: the bundled weights")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--batches", type=int, help="stop after so many")
args = parser.parse_args()

# Images and a table as NIH_Dataset reads them.
folder = Path(tempfile.mkdtemp())
if args.data:
    images = Path(args.data) / "images"
    table = next(Path(args.data).glob("Data_Entry_2017*.csv")).read_text()
    table = table.replace(".png", next(images.iterdir()).suffix)  # copies of the data may be JPEG
else:
    images = folder
    table = "Image Index,Finding Labels,Patient ID,Patient Age,Patient Gender,View Position\n"
    for i, (image, label) in enumerate(PhantomChest(64, size=128, nodule_fraction=0.2)):
        name = f"{i:08d}_000.png"
        finding = "Nodule" if label else "No Finding"
        save_image(image / 255, folder / name)
        table += f"{name},{finding},{i},50,M,PA\n"
(folder / "table.csv").write_text(table)

real = xrv.datasets.NIH_Dataset(
    str(images),
    csvpath=str(folder / "table.csv"),
    transform=xrv.datasets.XRayResizer(args.size),
    unique_patients=False,
)
xrv.datasets.relabel_dataset(xrv.datasets.default_pathologies, real, silent=True)

mix = SyntheticNoduleMix.from_pretrained(args.weights, p=0.3)
mixed = MixDataset(real, mix)
nodule = mixed.pathologies.index("Nodule")
real_rows, all_rows = (int(np.nansum(data.labels[:, nodule])) for data in (real, mixed))
print(f"{real_rows} real nodule rows, {all_rows} with grafts")

model = xrv.models.DenseNet(num_classes=18, in_channels=1, weights=None)
optimizer = torch.optim.Adam(model.parameters(), 1e-4)
for batch in islice(DataLoader(mixed, batch_size=8, shuffle=True), args.batches):
    logits = model(batch["img"])
    labels = batch["lab"].float()
    known = ~labels.isnan()
    loss = binary_cross_entropy_with_logits(logits[known], labels[known])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f} over {int(known.sum())} known labels of the last batch")
