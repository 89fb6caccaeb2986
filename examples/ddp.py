"""Data-parallel training under torchrun: each rank plans and renders its part, and no sample is synthetic twice.

    torchrun --nproc_per_node 2 examples/ddp.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Prints the loss and how many of all ranks' samples were synthetic, as `class_counts` had foretold.
"""

import argparse
from itertools import islice

import torch
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler
from torchvision.models import resnet18
from torchvision.transforms import v2

from carim_aug import SyntheticNoduleMix
from carim_aug.data import ChestXray14, PhantomChest

parser = argparse.ArgumentParser()
for name in ("--data", "--weights"):  # a folder in ChestX-ray14's layout; a folder or hub id
    parser.add_argument(name)
for name, default in (("--size", 224), ("--epochs", 1), ("--batches", None)):
    parser.add_argument(name, type=int, default=default)
args = parser.parse_args()

distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank = distributed.get_rank()
device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")

shape = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:
    train = ChestXray14(args.data, split="train", target="nodule", only_normal_or_nodule=True, transform=shape)
else:
    train = PhantomChest(400, nodule_fraction=0.2, seed=400, transform=shape)

mix = SyntheticNoduleMix.from_pretrained(args.weights, insertion="graft", p=0.3, device=device)
wrapped = mix.wrap(train)
loader = mix.loader(wrapped, batch_size=8, sampler=DistributedSampler(wrapped, shuffle=True, drop_last=True))

torch.manual_seed(0)
model = DistributedDataParallel(resnet18(num_classes=2).to(device))
optimizer = torch.optim.Adam(model.parameters(), 1e-4)
for epoch in range(args.epochs):
    foretold, seen = loader.class_counts()["Nodule"]["synthetic"], torch.zeros(2, dtype=torch.int64)
    for images, labels in islice(loader, args.batches):
        loss = cross_entropy(model(images.to(device).expand(-1, 3, -1, -1)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += torch.tensor([int(mix.last_params.synthetic.sum()), len(images)])
    total = seen.to(device)
    distributed.all_reduce(total)
    if rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}; {int(total[0])} of {int(total[1])} samples were synthetic")
        print(f"of all {len(train)} samples of the epoch: {foretold}, over {distributed.get_world_size()} ranks")
distributed.barrier()  # no rank leaves while another still talks to it
distributed.destroy_process_group()
