"""Training stacks, each as its user would write it, and whether the mix does there what the README promises.

    python tests/stacks.py                  # a table of all, in Markdown
    python tests/stacks.py lightning monai  # of some

Lines that end in `# mix` are what a user adds or changes; `job.saw` stands for the training step, and is given what the
model would be. That is compared, pixel by pixel, with the real images, and with a `mix.wrap(dataset)` of the same seed
whose items are read one by one after `set_epoch`. Each stack has processes of its own, two over gloo where it can.
"""

import faulthandler
import json
import os
import socket
import sys
import tempfile
from collections import namedtuple
from importlib.metadata import PackageNotFoundError, version
from inspect import getsource
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tiny import Samples, make_mix
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, default_collate
from torchvision.datasets import ImageFolder
from torchvision.ops import box_convert
from torchvision.transforms import v2

from carim_aug.data import PhantomChest
from carim_aug.labels.detection import instances
from carim_aug.ops.boxes import boxes_to_masks, dilate_boxes

EPOCHS, COUNT, SIZE, BATCH = 3, 16, 128, 2
SEAM = 0.05  # of a box, on each side, in which a graft fades out
SECONDS = 240  # until a process that hangs is ended
FLOAT = v2.ToDtype(torch.float32, scale=True)


class Row(NamedTuple):
    """What was seen of a stack. None: it has not several devices, or no epochs."""

    stack: str
    version: str
    lines: int
    disjoint: bool | None  # ranks share no image, and leave none out
    epochs: bool | None  # each has the nodules that `mix.wrap` has after `set_epoch`, and they differ
    resume: dict[str, bool]  # from the end of an "epoch", from a "step" within one: as if it had not been cut
    right: int  # images whose label, boxes and pixels agree, of `total`
    total: int
    grafted: int


Stack = namedtuple("Stack", "script name package ranks resumes")
STACKS: dict[str, Stack] = {}


def stack(name, package, ranks=1, resumes=()):
    """Register a script, which is run by so many processes, and again from each of `resumes`."""
    return lambda script: STACKS.setdefault(script.__name__, Stack(script, name, package, ranks, resumes)).script


class Job:
    """What a script is given, and where it says what its model sees."""

    def __init__(self, folder: Path, rank: int, resume: str | None):
        self.folder, self.rank, self.resume = folder, rank, resume
        self.own = folder / f"{rank}-{resume}"  # of this process and run alone
        self.own.mkdir()
        self.first, self.skipped = {None: (0, 0), "epoch": (1, 0), "step": (1, 2)}[resume]  # epoch, and batches of it
        self.real: Any = None  # the user's data set, before the mix
        self.nodule = 1  # the class of a nodule, or its column
        self.options: dict[str, Any] = {}
        self.reference: Any = None  # to compare with, if not `mix.wrap`
        self.seen: list[tuple[np.ndarray, Any]] = []

    def mix(self, **options):
        """Return what `SyntheticNoduleMix.from_pretrained(p=0.5, ...)` would, with a small, untrained generator."""
        self.options = {"p": 0.5, "seed": 3, "placement": "lungs", **options}
        return make_mix(**self.options)

    def saw(self, images, labels):
        self.seen += [(np.array(image), label) for image, label in zip(images, labels, strict=True)]


# --- Small things for all ---
def phantoms(**options):
    return PhantomChest(COUNT, size=SIZE, nodule_fraction=0.25, transform=FLOAT, **options)


def files(folder):
    """Write PNGs into the folders `normal` and `nodule`; return paths and labels."""
    found = []
    for i, (image, label) in enumerate(phantoms()):
        path = folder / ("normal", "nodule")[label] / f"{i:08d}_000.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)).save(path)
        found.append((str(path), label))
    return found


def collate_fn(batch):
    return tuple(zip(*batch, strict=True))


def small_net():
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 2))


def start_processes():
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")


# --- The stacks ---
@stack("torchvision, references/classification", "torchvision", ranks=2, resumes=("epoch",))
def torchvision_classification(job):
    start_processes()
    files(job.own)
    transform = v2.Compose([v2.PILToTensor(), FLOAT, v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    dataset = job.real = ImageFolder(job.own, transform)
    job.nodule = dataset.class_to_idx["nodule"]  # 0: folders are sorted

    mix = job.mix(value_range="imagenet")  # mix
    dataset = mix.wrap(dataset)  # mix
    train_sampler = DistributedSampler(dataset)
    data_loader = mix.loader(dataset, batch_size=BATCH, sampler=train_sampler, collate_fn=default_collate)  # mix
    for epoch in range(job.first, EPOCHS):
        train_sampler.set_epoch(epoch)
        for images, targets in data_loader:
            job.saw(images, targets)


@stack("torchvision, references/detection", "torchvision", resumes=("epoch",))
def torchvision_detection(job):
    chests = enumerate(phantoms(target="detection"))
    # As wrap_dataset_for_transforms_v2(CocoDetection(...)) has them: a target without boxes has no more than image_id.
    # Without _coco_remove_images_without_annotations: nodules go into such images.
    samples = [(image, {"image_id": i, **(target if len(target["boxes"]) else {})}) for i, (image, target) in chests]
    dataset = job.real = Samples(samples.__getitem__, COUNT)
    mix = job.mix()  # mix
    batches = BatchSampler(RandomSampler(dataset), BATCH, drop_last=True)
    data_loader = mix.loader(dataset, batch_sampler=batches, collate_fn=collate_fn)  # mix
    for epoch in range(job.first, EPOCHS):
        data_loader.set_epoch(epoch)  # for a resume  # mix
        for images, targets in data_loader:
            job.saw(images, targets)


@stack("torchxrayvision, train_model.py", "torchxrayvision", resumes=("epoch",))
def torchxrayvision(job):
    import torchxrayvision as xrv

    from carim_aug.integrations.torchxrayvision import MixDataset  # mix

    table = "Image Index,Finding Labels,Patient ID,Patient Age,Patient Gender,View Position\n"
    for i, (path, label) in enumerate(files(job.own)):
        table += f"{Path(path).relative_to(job.own)},{('No Finding', 'Nodule')[label]},{i},50,M,PA\n"
    (job.own / "table.csv").write_text(table)
    dataset = job.real = xrv.datasets.NIH_Dataset(str(job.own), csvpath=str(job.own / "table.csv"))
    xrv.datasets.relabel_dataset(xrv.datasets.default_pathologies, dataset, silent=True)
    job.nodule = dataset.pathologies.index("Nodule")

    dataset = MixDataset(dataset, job.mix())  # mix
    job.reference = MixDataset(job.real, job.mix())  # it chooses once which images get a nodule
    train_loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)
    for epoch in range(job.first, EPOCHS):
        dataset.set_epoch(epoch)  # for a resume  # mix
        for samples in train_loader:
            job.saw(samples["img"].float(), samples["lab"])
            assert np.array_equal(samples["lab"], dataset.labels[samples["idx"]], equal_nan=True)  # weights are of it


@stack("Lightning", "lightning", ranks=2, resumes=("epoch", "step"))
def lightning(job):
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Classifier(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.mix = small_net(), job.mix()  # mix
            self.train_data = job.real = phantoms()

        def train_dataloader(self):
            return self.mix.loader(self.train_data, batch_size=BATCH, shuffle=True)  # mix

        def training_step(self, batch, index):
            images, labels = batch
            job.saw(images, labels)
            return cross_entropy(self.net(images), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    every = {"dirpath": job.folder / f"after {job.resume}", "save_top_k": -1, "auto_insert_metric_name": False}
    saves = [ModelCheckpoint(filename="epoch{epoch}", **every)]
    saves += [ModelCheckpoint(filename="step{step}", every_n_train_steps=6, **every)]
    options = {"max_epochs": EPOCHS, "accelerator": "cpu", "callbacks": saves, "logger": False}
    after = job.resume and job.folder / "after None" / {"epoch": "epoch0.ckpt", "step": "step6.ckpt"}[job.resume]
    Trainer(strategy="ddp", devices=2, **options).fit(Classifier(), ckpt_path=after)


@stack("MONAI, tutorials' loop", "monai")
def monai(job):
    from monai.data import DataLoader, Dataset
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, ScaleIntensityd

    upright = {"reader": "PILReader", "reverse_indexing": False}  # MONAI's own order transposes a PNG  # mix
    steps = [LoadImaged("image", **upright), EnsureChannelFirstd("image"), ScaleIntensityd("image")]
    train_ds = job.real = Dataset([{"image": path, "label": label} for path, label in files(job.own)], Compose(steps))
    mix = job.mix()  # mix
    train_loader = DataLoader(mix.wrap(train_ds), batch_size=BATCH, shuffle=True)  # mix
    for _ in range(EPOCHS):
        for batch_data in train_loader:
            job.saw(batch_data["image"], batch_data["label"])


@stack("Hugging Face Trainer", "transformers", ranks=2, resumes=("epoch", "step"))
def transformers(job):
    import datasets
    from transformers import Trainer, TrainerCallback, TrainingArguments

    names = datasets.ClassLabel(names=["nodule", "normal"])
    rows = [{"image": path, "label": 1 - label} for path, label in files(job.own)]
    train = datasets.Dataset.from_list(rows, datasets.Features({"image": datasets.Image(), "label": names}))
    transform = v2.Compose([v2.PILToTensor(), FLOAT, v2.Normalize([0.5], [0.5])])

    def transform_rows(rows):
        return {"pixel_values": [transform(image) for image in rows["image"]], "label": rows["label"]}

    train = job.real = train.with_transform(transform_rows)
    job.nodule = 0

    mixed = job.mix(value_range="symmetric").wrap(train)  # mix

    class SetEpoch(TrainerCallback):  # mix
        def on_epoch_begin(self, args, state, control, **more):  # mix
            mixed.set_epoch(int(state.epoch))  # 1.5 where the second is resumed  # mix

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, pixel_values, labels):
            job.saw(pixel_values, labels)
            return {"loss": cross_entropy(self.net(pixel_values), labels)}

    options = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "remove_unused_columns": False}
    options |= {"use_cpu": True, "ddp_backend": "gloo", "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(f"{job.folder}/after {job.resume}", save_strategy="steps", save_steps=2, **options)
    after = job.resume and f"{job.folder}/after None/checkpoint-{ {'epoch': 4, 'step': 6}[job.resume] }"
    trainer = Trainer(Classifier(), arguments, train_dataset=mixed, callbacks=[SetEpoch()])  # mix
    trainer.train(resume_from_checkpoint=after)


@stack("Accelerate", "accelerate", ranks=2, resumes=("epoch", "step"))
def accelerate(job):
    from accelerate import Accelerator

    accelerator, train, model = Accelerator(cpu=True), phantoms(), small_net()
    job.real, optimizer = train, torch.optim.SGD(model.parameters(), 1e-3)
    mix = job.mix()  # mix
    train_dataloader = mix.loader(train, batch_size=BATCH, shuffle=True)  # mix
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    for epoch in range(job.first, EPOCHS):
        train_dataloader.set_epoch(epoch)  # for a resume, before skip_first_batches  # mix
        skipped = job.skipped if epoch == job.first else 0
        active = accelerator.skip_first_batches(train_dataloader, skipped) if skipped else train_dataloader
        for images, labels in active:
            job.saw(images, labels)
            accelerator.backward(cross_entropy(model(images), labels))
            optimizer.step()


@stack("Ultralytics, over `carim-aug export`", "ultralytics")
def ultralytics(job):
    os.environ["YOLO_CONFIG_DIR"] = str(job.own)
    from ultralytics.models.yolo.detect import DetectionTrainer

    from carim_aug.tools.cli import main

    class Trainer(DetectionTrainer):
        def preprocess_batch(self, batch):
            batch = super().preprocess_batch(batch)
            boxes = box_convert(batch["bboxes"] * SIZE, "cxcywh", "xyxy")
            own = [boxes[batch["batch_idx"] == i] for i in range(len(batch["img"]))]
            job.saw(batch["img"], [{"boxes": b, "labels": torch.ones(len(b), dtype=torch.int64)} for b in own])
            return batch

    make_mix().save_pretrained(job.own / "weights")
    images = [v2.functional.pil_to_tensor(Image.open(path)) / 255 for path, _ in files(job.own / "real")]
    job.real = [(image.expand(3, -1, -1), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}) for image in images]
    own = ["--weights", f"{job.own}/weights", "--data", f"{job.own}/real", "--out", f"{job.own}/grafts"]
    assert main(["export", *own, "--n", "6", "--negatives", "4"]) == 0  # carim-aug export ...  # mix
    augments = ("mosaic", "fliplr", "hsv_h", "hsv_s", "hsv_v", "translate", "scale", "erasing")
    options = {"model": "yolo11n.yaml", "epochs": 2, "imgsz": SIZE, "batch": 5, "workers": 0, "device": "cpu"}
    options |= {"project": str(job.own), "val": False, "plots": False, **dict.fromkeys(augments, 0.0)}
    Trainer(overrides={"data": f"{job.own}/grafts/data.yaml", **options}).train()  # mix


@stack("DDP by hand, mix.loader", "torch", ranks=2, resumes=("epoch", "step"))
def ddp_loader(job):
    start_processes()
    train = job.real = phantoms()
    mix = job.mix()  # mix
    train = mix.wrap(train)  # mix
    sampler = DistributedSampler(train)
    loader = mix.loader(train, batch_size=BATCH, sampler=sampler)  # mix
    if job.resume:
        loader.load_state_dict(torch.load(job.folder / f"{job.resume}-{job.rank}.pt"))  # mix
    for epoch in range(job.first, EPOCHS):
        sampler.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader, start=1):
            job.saw(images, labels)
            after = {(0, 4): "epoch", (1, 2): "step"}.get((epoch, step))
            if after and not job.resume:
                torch.save(loader.state_dict(), job.folder / f"{after}-{job.rank}.pt")  # mix


@stack("DDP by hand, DataLoader(mix.wrap)", "torch", ranks=2, resumes=("epoch",))
def ddp_wrap(job):
    start_processes()
    train = job.real = phantoms()
    mix = job.mix()  # mix
    train = mix.wrap(train)  # mix
    sampler = DistributedSampler(train)
    loader = DataLoader(train, batch_size=BATCH, sampler=sampler)
    for epoch in range(job.first, EPOCHS):
        sampler.set_epoch(epoch)
        train.set_epoch(epoch)  # mix
        for images, labels in loader:
            job.saw(images, labels)


@stack("ignite", "pytorch-ignite", resumes=("epoch",))
def ignite(job):
    from ignite.engine import Engine, Events

    train = job.real = phantoms()
    mix = job.mix()  # mix
    train = mix.wrap(train)  # mix
    trainer = Engine(lambda engine, batch: job.saw(*batch))

    @trainer.on(Events.EPOCH_STARTED)
    def set_epoch(engine):
        train.set_epoch(engine.state.epoch - 1)  # for a resume  # mix

    @trainer.on(Events.EPOCH_COMPLETED(once=1))
    def save(engine):
        torch.save(engine.state_dict(), job.folder / "trainer.pt")

    if job.resume:
        trainer.load_state_dict(torch.load(job.folder / "trainer.pt"))
    trainer.run(DataLoader(train, batch_size=BATCH, shuffle=True), max_epochs=EPOCHS)


@stack("fastai", "fastai")
def fastai(job):
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    class Watch(Callback):
        def before_batch(self):
            if self.training:
                job.saw(*self.xb, *self.yb)

    train = job.real = phantoms()
    mix = job.mix()  # mix
    dls = DataLoaders(mix.loader(train, batch_size=BATCH, shuffle=True), DataLoader(train, batch_size=BATCH))  # mix
    Learner(dls, small_net(), loss_func=nn.CrossEntropyLoss(), cbs=[Watch()], path=job.own).fit(EPOCHS)


# --- What was seen ---
Seen = namedtuple("Seen", "pixels row boxes")  # the label is a row of numbers, or boxes


def alike(one, other):
    pairs = zip(one, other, strict=True)
    return all(a.shape == b.shape and np.allclose(a, b, atol=1e-4, equal_nan=True) for a, b in pairs)


def judge(job):
    """Return of each image that was seen: which it is, what changed in it, and whether label and boxes say so."""
    reference, planned = job.reference or make_mix(**job.options).wrap(job.real), make_mix().wrap(job.real).planned

    def view(image, label):
        if planned.policy.kind == "detection":
            return Seen(np.asarray(image), np.zeros(1), instances(label)[0].numpy())
        row = np.asarray(label, dtype=np.float64)
        return Seen(np.asarray(image), row if row.ndim else np.array([float(row == job.nodule)]), np.zeros((0, 4)))

    # What there is, and what the mix makes of it in each epoch.
    real, wanted = [view(*planned.layout.get(job.real[i])) for i in range(COUNT)], {}
    pixels = np.stack([one.pixels for one in real])
    for epoch in range(EPOCHS if job.options else 0):
        reference.set_epoch(epoch)
        for i in range(COUNT):
            sample = view(*planned.layout.get(reference[i]))
            wanted[epoch, i] = sample, reference.decision(i).boxes_at(SIZE, SIZE)

    records = []
    for seen in (view(*sample) for sample in job.seen):
        i = int((pixels == seen.pixels).reshape(COUNT, -1).mean(1).argmax())
        epochs = [e for e in range(EPOCHS) if (e, i) in wanted and alike(seen, wanted[e, i][0])]
        old, changed, column = real[i], (seen.pixels != pixels[i]).any(0), job.nodule if len(seen.row) > 1 else 0
        added = seen.boxes[len(old.boxes) :]
        said, lost = len(added) or seen.row[column] > old.row[column], seen.row[column] < old.row[column]
        others = np.array_equal(np.delete(seen.row, column), np.delete(old.row, column), equal_nan=True)
        others &= np.array_equal(seen.boxes[: len(old.boxes)], old.boxes)
        boxes = wanted[epochs[0], i][1] if epochs and said else torch.as_tensor(added)
        inside = boxes_to_masks([dilate_boxes(boxes, SEAM, SIZE)], SIZE)[0, 0].numpy() > 0
        right = others and not lost and bool(said) == changed.any() and not (changed & ~inside).any()
        record = {"i": i, "change": np.flatnonzero(changed).tolist(), "epochs": epochs}
        records.append(record | {"right": bool(right), "grafted": bool(said)})
    return records


# --- Processes ---
def work(rank, name, folder, ranks, port):
    """Be one process of a stack: run its script, then again from where that has saved."""
    os.dup2(2, 1)  # the table alone goes to stdout
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {key: str(value) for key, value in address.items() if ranks > 1}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
    torch.set_num_threads(1)
    for resume in (None, *STACKS[name].resumes):
        job = Job(folder, rank, resume)
        STACKS[name].script(job)
        (folder / f"{rank}-{resume}.json").write_text(json.dumps(judge(job)))
    if distributed.is_initialized():
        distributed.barrier()  # no rank leaves while another still talks to it
        distributed.destroy_process_group()


def run(name):
    """Return what each rank of a stack saw, from the start (None) and after each cut."""
    ranks, cuts = STACKS[name].ranks, (None, *STACKS[name].resumes)
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "carim_aug"])  # imported once
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        given = (name, Path(folder), ranks, port)
        torch.multiprocessing.start_processes(work, given, ranks, start_method="forkserver")
        texts = {cut: [Path(folder, f"{rank}-{cut}.json").read_text() for rank in range(ranks)] for cut in cuts}
    return {cut: [json.loads(text) for text in own] for cut, own in texts.items()}


def measure(name) -> Row:
    """Run a stack and return its row."""
    own, runs = STACKS[name], run(name)
    whole, each = runs[None], COUNT // own.ranks  # images of a rank in an epoch
    records = [record for rank in whole for record in rank]

    def by_epoch(ranks):
        parts = [[r for rank in ranks for r in rank[start : start + each]] for start in range(0, len(ranks[0]), each)]
        return [sorted(part, key=lambda record: record["i"]) for part in parts]

    disjoint = epochs = None
    if own.package != "ultralytics":  # an export is the same in all
        parts = by_epoch(whole)
        complete = [[record["i"] for record in part] for part in parts] == [list(range(COUNT))] * EPOCHS
        changes = [[record["change"] for record in part] for part in parts]
        told = all(e in record["epochs"] for e, part in enumerate(parts) for record in part)
        epochs = complete and told and changes[0] != changes[1] != changes[2]
        disjoint = complete if own.ranks > 1 else None
    resume = {}
    for after in own.resumes:  # the order within an epoch may be the user's; from a step on it must be the same
        rest = [rank[each + 2 * BATCH * (after == "step") :] for rank in whole]
        resume[after] = runs[after] == rest if after == "step" else by_epoch(runs[after]) == by_epoch(rest)
    lines = sum(line.endswith("# mix") for line in getsource(own.script).splitlines())
    right, grafted = (sum(record[fact] for record in records) for fact in ("right", "grafted"))
    return Row(own.name, find_version(name), lines, disjoint, epochs, resume, right, len(records), grafted)


def find_version(name):
    """Return the version of a stack's package, or None."""
    try:
        return version(STACKS[name].package)
    except PackageNotFoundError:
        return None


def main(names):
    """Print the table; a stack that fails has its error's last line."""
    words, skipped = {None: "-", True: "yes", False: "**no**"}, []
    head = ("stack", "version", "lines changed", "ranks disjoint", "epochs differ", "resume equal", "labels right")
    print("|", " | ".join((*head, "grafted")), "|\n" + "|---" * 8 + "|")
    for name in names or STACKS:
        cells = [STACKS[name].name, find_version(name)]
        if cells[1] is None:
            skipped.append(f"{cells[0]} ({STACKS[name].package} is missing)")
            continue
        try:
            row = measure(name)
            resume = ", ".join(f"{after} {words[equal]}" for after, equal in row.resume.items()) or "-"
            cells += [row.lines, words[row.disjoint], words[row.epochs], resume, f"{row.right} of {row.total}"]
            cells += [row.grafted]
        except torch.multiprocessing.ProcessRaisedException as error:
            cells += [f"**{str(error).strip().splitlines()[-1]}**", *[""] * 5]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
    print("\nskipped:", ", ".join(skipped) or "none")


if __name__ == "__main__":
    main(sys.argv[1:])
