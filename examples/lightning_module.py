"""A LightningModule with grafted nodules in its training loader; the generator is no part of the model.

    python examples/lightning_module.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Prints the AUC on real images, and what the checkpoint holds.
"""

import argparse

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAUROC
from torchvision.models import resnet18
from torchvision.transforms import v2

from carim_aug import LinearSchedule, SyntheticNoduleMix, assert_real_only
from carim_aug.data import ChestXray14, PhantomChest

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="folder in ChestX-ray14's layout")
parser.add_argument("--weights", help="folder or hub id; default: the bundled weights")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batches", type=int, help="stop each epoch, and validation, after so many")
args = parser.parse_args()

transform = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:
    options = {"target": "nodule", "only_normal_or_nodule": True, "transform": transform}
    train = ChestXray14(args.data, split="train", **options)
    val = ChestXray14(args.data, split="val", **options)
else:
    train = PhantomChest(400, nodule_fraction=0.2, seed=400, transform=transform)
    val = PhantomChest(100, nodule_fraction=0.2, seed=100, transform=transform)


class NoduleClassifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = resnet18(num_classes=2)
        self.auc = BinaryAUROC()
        # 40 % of the normal images get a nodule in the first epoch, 10 % from the tenth on.
        self.mix = SyntheticNoduleMix.from_pretrained(args.weights, p=LinearSchedule(0.4, 0.1, epochs=10))

    def forward(self, images):
        return self.net(images.expand(-1, 3, -1, -1))

    def train_dataloader(self):
        return self.mix.loader(train, batch_size=16, shuffle=True)

    def training_step(self, batch, index):
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch, index):
        images, labels = batch
        self.auc(self(images).softmax(dim=1)[:, 1], labels)
        self.log("auc", self.auc, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-4)


lightning.seed_everything(0, verbose=False)
val_loader = DataLoader(val, batch_size=16, sampler=torch.randperm(len(val)).tolist())
assert_real_only(val_loader)

model = NoduleClassifier()
trainer = lightning.Trainer(
    max_epochs=args.epochs,
    limit_train_batches=args.batches,
    limit_val_batches=args.batches,
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(model, val_dataloaders=val_loader)
print(f"AUC on real images {float(trainer.callback_metrics['auc']):.3f}")
print(f"the checkpoint holds {sorted({name.split('.')[0] for name in model.state_dict()})}")
