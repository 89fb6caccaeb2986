"""albumentations with boxes: a graft, then its own transforms, in a data set that knows nothing of carim_aug.

    python examples/albumentations_boxes.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Prints how many boxes came in over two epochs.
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

# Your own images and boxes. The number of the nodule class is yours, too: 6 in ChestX-ray14, 1 in the phantoms.
if args.data:
    xrays = ChestXray14(args.data, split="train", target="detection", findings=("No Finding", "Nodule"))
    number = xrays.classes.index("Nodule")
else:
    xrays = PhantomChest(200, nodule_fraction=0.3, target="detection")
    number = 1

graft = GraftNodule(args.weights, label=number, p=0.5)
pipeline = A.Compose(
    [
        graft,
        A.Resize(args.size, args.size),
        A.HorizontalFlip(),
        A.RandomBrightnessContrast(),
    ],
    bbox_params=A.BboxParams(format="pascal_voc", label_fields=["labels"]),
)


class AugmentedXrays(Dataset):
    def __len__(self):
        return len(xrays)

    def __getitem__(self, i):
        image, target = xrays[i]
        boxes = np.asarray(target["boxes"], dtype=np.float32)
        labels = target["labels"].numpy()
        # With an index, what becomes of an image depends on seed, epoch and index alone.
        augmented = pipeline(image=image[0].numpy(), bboxes=boxes, labels=labels, index=i)
        new_boxes = len(augmented["bboxes"]) - len(boxes)
        return augmented["image"], augmented["bboxes"], augmented["labels"], new_boxes


loader = DataLoader(AugmentedXrays(), batch_size=8, num_workers=2, persistent_workers=True, collate_fn=list)
for epoch in range(2):
    graft.set_epoch(epoch)
    images = new = 0
    for batch in islice(loader, args.batches):
        images += len(batch)
        new += sum(new_boxes for _, _, _, new_boxes in batch)
    print(f"epoch {epoch}: {images} images, {new} boxes came in")
