"""Data-parallel training under torchrun: each rank generates its own part, and no sample is synthetic twice.

    torchrun --nproc_per_node 2 examples/ddp.py --data FOLDER      # ChestX-ray14's layout; without it: drawn phantoms

Prints the loss and how many of all ranks' samples were synthetic, beside what `class_counts` had said before.
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
parser.add_argument("--data", help="folder in ChestX-ray14's layout")
parser.add_argument("--weights", help="folder or hub id; default: the bundled weights")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batches", type=int, help="stop each epoch after so many")
args = parser.parse_args()

distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank = distributed.get_rank()
if torch.cuda.is_available():
    device = torch.device("cuda", rank % torch.cuda.device_count())
else:
    device = torch.device("cpu")

transform = v2.Compose([v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)])
if args.data:
    train = ChestXray14(args.data, split="train", target="nodule", only_normal_or_nodule=True, transform=transform)
else:
    train = PhantomChest(400, nodule_fraction=0.2, seed=400, transform=transform)

# The sampler is over the wrapped data set, which is as long as the mix makes it.
mix = SyntheticNoduleMix.from_pretrained(args.weights, p=0.3, device=device)
wrapped = mix.wrap(train)
sampler = DistributedSampler(wrapped, shuffle=True, drop_last=True)
loader = mix.loader(wrapped, batch_size=8, sampler=sampler)

torch.manual_seed(0)
model = DistributedDataParallel(resnet18(num_classes=2).to(device))
optimizer = torch.optim.Adam(model.parameters(), 1e-4)
for epoch in range(args.epochs):
    expected = loader.class_counts()["Nodule"]["synthetic"]
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # synthetic samples, all samples
    for images, labels in islice(loader, args.batches):
        logits = model(images.to(device).expand(-1, 3, -1, -1))
        loss = cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        counts[0] += int(mix.last_params.synthetic.sum())
        counts[1] += len(images)
    distributed.all_reduce(counts)
    if rank == 0:
        ranks = distributed.get_world_size()
        print(f"epoch {epoch}: loss {loss.item():.3f}; {int(counts[0])} of {int(counts[1])} samples were synthetic")
        print(f"in a whole epoch of {len(train)} samples, over {ranks} ranks: {expected}")

distributed.barrier()  # no rank leaves while another still talks to it
distributed.destroy_process_group()
