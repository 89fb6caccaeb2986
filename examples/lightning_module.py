"""A LightningModule with grafted nodules in its training loader; the generator is no part of the model.

Run `python examples/lightning_module.py --data FOLDER`, ChestX-ray14's layout; without it: drawn phantoms.
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
for name, default in (("--size", 224), ("--epochs", 1), ("--batches", None)):
    parser.add_argument(name, type=int, default=default)
args = parser.parse_args()
shape = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:
    options = {"target": "nodule", "only_normal_or_nodule": True, "transform": shape}
    train, val = (ChestXray14(args.data, split=split, **options) for split in ("train", "val"))
else:
    train, val = (PhantomChest(n, nodule_fraction=0.2, seed=n, transform=shape) for n in (400, 100))


class NoduleClassifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.auc = resnet18(num_classes=2), BinaryAUROC()
        self.mix = SyntheticNoduleMix.from_pretrained(args.weights, insertion="graft", p=LinearSchedule(0.4, 0.1, 10))

    def train_dataloader(self):
        return self.mix.loader(train, batch_size=16, shuffle=True)

    def training_step(self, batch, index):
        return cross_entropy(self.net(batch[0].expand(-1, 3, -1, -1)), batch[1])

    def validation_step(self, batch, index):
        self.auc(self.net(batch[0].expand(-1, 3, -1, -1)).softmax(1)[:, 1], batch[1])
        self.log("auc", self.auc, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-4)


lightning.seed_everything(0, verbose=False)
val_loader = DataLoader(val, batch_size=16, sampler=torch.randperm(len(val)).tolist())
assert_real_only(val_loader)
model, limits = NoduleClassifier(), {f"limit_{part}_batches": args.batches for part in ("train", "val")}
trainer = lightning.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False, **limits)
trainer.fit(model, val_dataloaders=val_loader)
print(f"AUC on real images {float(trainer.callback_metrics['auc']):.3f}")
print(f"the checkpoint holds {sorted({name.split('.')[0] for name in model.state_dict()})}")
