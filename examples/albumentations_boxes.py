"""albumentations with boxes: a graft, then its own transforms, in a data set that knows nothing of us.

    python examples/albumentations_boxes.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Prints how many boxes came in over two epochs, and how often a nodule was used.
"""

import argparse
from itertools import islice

import albumentations as A
import numpy as np
from torch.utils.data import DataLoader, Dataset

from carim_aug.data import ChestXray14, PhantomChest
from carim_aug.integrations.albumentations import GraftNodule

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="folder in ChestX-ray14's layout")
parser.add_argument("--weights", help="folder or hub id; default: the bundled weights")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--batches", type=int, help="stop each epoch after so many")
args = parser.parse_args()

if args.data:
    films = ChestXray14(args.data, split="train", target="detection", findings=("No Finding", "Nodule"))
else:
    films = PhantomChest(200, nodule_fraction=0.3, target="detection")
number = films.classes.index("Nodule") if args.data else 1

graft = GraftNodule(args.weights, size=128, label=number, p=0.5)
pipeline = A.Compose(
    [graft, A.Resize(args.size, args.size), A.HorizontalFlip(), A.RandomBrightnessContrast()],
    bbox_params=A.BboxParams(format="pascal_voc", label_fields=["labels"]),
)


class Films(Dataset):
    def __len__(self):
        return len(films)

    def __getitem__(self, i):
        image, target = films[i]
        boxes = np.asarray(target["boxes"], dtype=np.float32)
        done = pipeline(image=image[0].numpy(), bboxes=boxes, labels=target["labels"].numpy(), index=i)
        return done["image"], done["bboxes"], list(done["labels"]), len(done["bboxes"]) - len(boxes)


loader = DataLoader(Films(), batch_size=8, num_workers=2, persistent_workers=True, collate_fn=list)
for epoch in range(2):
    graft.set_epoch(epoch)
    items = [item for batch in islice(loader, args.batches) for item in batch]
    print(f"epoch {epoch}: {len(items)} films, {sum(n for *_, n in items)} boxes came in")
told = graft.pool.statistics()
print(f"{told['distinct']} different nodules, each used {told['mean_uses']:.1f} times")
