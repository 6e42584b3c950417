"""Simulate realistic results on label maps of blobs.

The classifiers differ in their confidence and in their preference for frequent classes.
"""

from functools import cache

import numpy as np
import torch

from data_prep.settings import VOID
from hpc.storage.atomic import fingerprint
from jobs.losses.grammar import parse_loss
from jobs.metrics.counts import NAMES, Counts
from jobs.metrics.reference import count_image
from pipeline.scores.results_file import DatasetResults, Results, ResultsFile

CLASSES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
           "pedestrian", "cyclist"]  # fmt: skip
SHARES = [0.17, 0.24, 0.01, 0.3, 0.06, 0.11, 0.012, 0.015, 0.06, 0.007, 0.003]


def label_map(generator, shares, size=(60, 80), void=VOID):
    """Blobs of labels in the proportions `shares`, with a seam of void between blobs."""
    centres = generator.random((60, 2)) * size
    labels = generator.choice(len(shares), 60, p=np.array(shares) / np.sum(shares))
    labels[: len(shares)] = np.arange(len(shares))  # no class is absent
    places = np.stack(np.mgrid[: size[0], : size[1]], -1).reshape(-1, 1, 2)
    distance = ((places - centres) ** 2).sum(-1) ** 0.5
    nearest, second = np.partition(distance, 1, axis=1)[:, :2].T
    target = np.where(second - nearest < 0.7, void, labels[distance.argmin(1)])
    return torch.from_numpy(target.reshape(size).astype(np.uint8))


@cache
def validation(images):
    """The validation set: the same label maps for every cell."""
    generator = np.random.default_rng(7)
    return [label_map(generator, SHARES) for _ in range(images)]


def logits_for(generator, target, shares, skill, sharpness, prior):
    """Scores of a classifier that sees the label with noise and leans to frequent classes."""
    num_classes = len(shares)
    truth = np.eye(num_classes + 1)[np.minimum(target.numpy(), num_classes)][..., :num_classes]
    noise = generator.normal(size=(*target.shape, num_classes))
    coarse = np.kron(generator.normal(size=(6, 8, num_classes)), np.ones((10, 10, 1)))
    lean = prior * np.log(np.array(shares) / np.sum(shares))
    logits = sharpness * (skill * truth + noise + coarse + lean)
    return torch.from_numpy(logits.transpose(2, 0, 1).astype(np.float32))


def cell_counts(seed, skill, sharpness, prior, images=4, bins=10):
    generator = np.random.default_rng(seed)
    total = Counts.zeros(len(SHARES), bins)
    for target in validation(images):
        total += count_image(
            logits_for(generator, target, SHARES, skill, sharpness, prior), target, bins, VOID
        )
    return total


def character(loss):
    """(skill, sharpness, prior): a weighted loss leans less, a dice is surer of itself."""
    weighted = loss.count("W") / 2
    dice = loss.count("DL") * (0.4 if "N" in loss[1:] or "A" in loss[1:] else 1.0)
    return 3.9 + 0.25 * dice - 0.3 * weighted, 1.3 + 0.7 * dice, 0.9 - 0.5 * weighted


def loss_record(name):
    spec = parse_loss("CE" if name == "pre-fine" else name)
    schedule = [{"at": k.at, "weights": list(k.weights), "ramp": k.ramp} for k in spec.schedule]
    return {"name": name, "terms": [term.name for term in spec.terms], "schedule": schedule}


def dataset_results(name, models, losses, seeds, classes=CLASSES):
    cells, counts = [], []
    for model in models:
        for index, loss in enumerate(losses):
            for seed in seeds:
                skill, sharpness, prior = character(loss)
                skill += 0.4 * (model != models[0]) - 0.3 * (name != "camvid") + 0.02 * index
                counts.append(cell_counts(100 * seed + index, skill, sharpness, prior))
                cells.append(cell_record(name, model, loss, seed))
    arrays = {key: np.stack([one.as_arrays()[key] for one in counts]) for key in NAMES}
    val = counts[0].confusion.sum(axis=1)
    train = (np.array(SHARES) * 3e7).astype(np.int64)
    return DatasetResults(name, list(classes), train, val, cells, arrays)


def cell_record(dataset, model, loss, seed):
    return {
        "signature": fingerprint([dataset, model, loss, seed])[:16],
        "name": f"{dataset}/{model}/{loss}/{seed}",
        "model": model,
        "loss": loss,
        "seed": seed,
        "notes": [],
        "backbone": "",
    }


def made_up_results(grid="camvid", datasets=("camvid",), models=("fcn_resnet101",),
            losses=("WCE", "WDLNWCE"), seeds=(0, 1), classes=CLASSES, **record):  # fmt: skip
    parts = [dataset_results(name, models, losses, seeds, classes) for name in datasets]
    record = {
        "missing": [],
        "notes": [],
        "protocol": {"epochs": 30, "crop": [480, 480], "pretrain": {"epochs": 20}},
        "commit": "0123abc",
        "losses": [loss_record(loss) for loss in losses],
        **record,
    }
    return Results(grid, record, parts)


def write_results(path, results):
    file = ResultsFile(results.grid)
    for dataset in results.datasets:
        file.add(dataset)
    file.write(path, results.record)
