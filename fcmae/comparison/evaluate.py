"""From trained arms to the contents of report.json."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fcmae import config as settings
from fcmae import pictures
from fcmae.analysis.blocks import dense
from fcmae.analysis.cosine_distance import cosine_distances
from fcmae.comparison import measure
from fcmae.comparison.memory import peak_memory
from fcmae.comparison.settings import CompareConfig
from fcmae.data import MaskedImages
from fcmae.data.transforms import stats
from fcmae.downstream import representation
from fcmae.downstream.labelled import CentreCrops, Labelled
from fcmae.errors import UsageError
from fcmae.masking import grid_size, keep_count
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.support import MINKOWSKI
from fcmae.pretrain import build_model, worker_count
from fcmae.schema import Config
from fcmae.train import checkpoint
from fcmae.train.loop import tiles_of
from fcmae.train.run_folder import RunFolder
from fcmae.train.schedule import resolve_batch
from fcmae.weights import read_checkpoint

FORMAT = "fcmae-comparison-1"
SHEET = "reconstructions.png"


def evaluate(
    config: CompareConfig,
    arms: dict[str, Config],
    dataset: MaskedImages,
    labelled: Labelled | None,
    device: torch.device,
    processes: int,
) -> dict:
    """Everything that the report says, as plain data; writes the sheet of reconstructions into the folder.

    processes: how many trained together.
    """
    curves = {name: measure.read_curve(RunFolder(Path(arm.out))) for name, arm in arms.items()}
    for name, curve in curves.items():
        if not curve["step"]:
            raise UsageError(f"arm {name}: no step had a finite loss, so there is nothing to compare")
    memory = {}
    for name, arm in arms.items():  # before the models are there, which need memory too
        print(f"measuring the memory of {name}", flush=True)
        memory[name] = peak_memory(arm, RunFolder(Path(arm.out)).config, device)
    models = {name: (_trained(arm).to(device), _random(arm).to(device)) for name, arm in arms.items()}
    finals = {name: curve["smooth"][-1] for name, curve in curves.items()}
    target = max(finals.values()) if config.time_to_loss is None else config.time_to_loss

    items = [dataset[(0, int(i))] for i in _spread_out(len(dataset), config.evaluate.images)]
    errors = _reconstructions(config, {n: pair[0] for n, pair in models.items()}, items, device) if items else {}
    found = _representations(config, models, dataset, labelled, device)
    unreadable = found.pop("unreadable", None)

    rows = {}
    for name, arm in arms.items():
        rows[name] = _row(arm, curves[name], models[name][0], target, processes)
        rows[name]["peak_memory"] = memory[name]
        rows[name]["reconstruction_loss"] = errors.get(name)
        rows[name]["representation"] = found[name]
    model = models[next(iter(models))][0]
    gh, gw = grid_size(model.image_size, model.mask_unit)
    return {
        "format": FORMAT,
        "budget": settings.to_dict(config.budget),
        "arms_in_turn": config.arms_in_turn,
        "machine": measure.machine(device) | {"processes": processes},
        "data": {
            "source": config.data.source,
            "images": len(dataset),
            "image_size": list(model.image_size),
            "regions": gh * gw,
            "region_pixels": model.mask_unit,
            "visible": keep_count(gh * gw, model.mask_ratio),
        },
        "labelled": labelled and labelled.describe() | {"source": config.data.labelled, "unreadable": unreadable},
        "time_to_loss": {"loss": target, "given": config.time_to_loss is not None},
        "reconstructions": [dataset.source.name(item["index"]) for item in items],
        "arms": rows,
        "settings": settings.to_dict(config),
    }


def up_to_date(path: Path, config: CompareConfig) -> bool:
    """Whether the report at `path` is whole and of these settings."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    if report.get("format") != FORMAT:
        return False
    return not settings.differences(report["settings"], settings.to_dict(config), settings.FREE_KEYS)


def _row(arm: Config, curve: dict, model: MaskedAutoencoder, target: float, processes: int) -> dict:
    folder = RunFolder(Path(arm.out))
    newest = checkpoint.read(checkpoint.find_newest(folder.checkpoints)[0])
    images_per_step = resolve_batch(arm.train, processes)[1]
    return {
        "model": arm.model.name,
        "steps": newest["step"],
        "images": newest["step"] * images_per_step,
        "images_per_step": images_per_step,
        "seconds": newest["seconds"],
        "skipped_steps": newest["skipped"],
        "unreadable_images": newest["bad_images"],
        "final_loss": curve["smooth"][-1],
        "averaged_over": measure.window(len(curve["loss"])),
        **measure.pace(curve, images_per_step),
        "to_loss": measure.time_to(curve, target),
        "parameters": measure.parameters(model),
        "flops": measure.flops(arm),
        "curve": measure.thinned({key: curve[key] for key in ("step", "seconds", "loss", "smooth")}),
        "settings": settings.to_dict(arm),
    }


def _trained(arm: Config) -> MaskedAutoencoder:
    model = build_model(_without_engine(arm))
    model.load_state_dict(read_checkpoint(arm.out), strict=True)
    return model.eval()


def _random(arm: Config) -> MaskedAutoencoder:
    """The model as its training began, without `init`."""
    torch.manual_seed(arm.seed)
    return build_model(_without_engine(arm)).eval()


def _without_engine(arm: Config) -> Config:
    """The same model on this toolkit's kernels: its blocks can be watched, and the result is the same."""
    arm = copy.deepcopy(arm)
    if arm.sparse.backend == MINKOWSKI:
        arm.sparse.backend = "auto"
    return arm


def _spread_out(length: int, count: int) -> list[int]:
    """`count` numbers below `length`, or fewer, evenly apart."""
    return sorted(set(np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()))


def _reconstructions(config: CompareConfig, models: dict, items: list[dict], device: torch.device) -> dict[str, float]:
    """Draws the sheet; each model's loss on these images and masks."""
    images = torch.stack([item["image"] for item in items]).to(device)
    tiles = tiles_of(torch.stack([item["mask"] for item in items])).to(device)
    columns: dict[str, Tensor] = {"original": images}
    errors = {}
    for name, model in models.items():
        masked, filled = pictures.reconstruct(model, images, tiles)
        columns = {**columns, "masked": masked, name: filled}
        with torch.no_grad():
            errors[name] = model(images, tiles)[0].item()
    title = "visible regions pasted in"
    if config.loss.norm_pix:
        title += f"; {pictures.TRUE_STATISTICS}"
    mean, std = stats(config.model.in_chans, config.data.mean, config.data.std)
    pictures.reconstruction_sheet(Path(config.out) / SHEET, columns, mean, std, title)
    return errors


def _representations(
    config: CompareConfig, models: dict, dataset: MaskedImages, labelled: Labelled | None, device: torch.device
) -> dict:
    """Of each arm, trained and at its random initialisation: kNN, probe, and the cosine distance after each block."""
    e = config.evaluate
    each = {
        (name, state): dense(model)
        for name, pair in models.items()
        for state, model in zip(("trained", "random"), pair, strict=True)
    }
    chosen = _spread_out(len(dataset), e.distance_images)
    images = torch.stack([dataset[(0, i)]["image"] for i in chosen]).to(device)
    found: dict = {name: {} for name in models}
    print("encoding whole images", flush=True)
    for (name, state), model in each.items():
        layers = cosine_distances(model, images.split(e.batch_size))
        mean = statistics.fmean(layer["distance"] for layer in layers)
        found[name][state] = {"cosine_distance": {"mean": mean, "images": len(chosen), "layers": layers}}
    if labelled is None:
        return found

    parts: dict = {}
    encoders = {
        key: lambda images, model=model: representation.pooled(model.encode(images)) for key, model in each.items()
    }
    for part, files in (("train", labelled.train), ("val", labelled.val)):
        crops = CentreCrops(
            files, next(iter(each.values())).image_size, config.model.in_chans, config.data.mean, config.data.std
        )
        batches = representation.loader(crops, e.batch_size, worker_count(config.data.workers))
        bar = tqdm(batches, desc=f"features of labelled images, {part}", disable=None)
        parts[part] = representation.features(encoders, bar, device)
    (train, train_labels, bad), (val, val_labels, worse) = parts["train"], parts["val"]
    if not len(train_labels) or not len(val_labels):
        raise UsageError(f"no image of a part of data.labelled={config.data.labelled} could be read")
    found["unreadable"] = bad + worse
    for name, state in each:
        x, y, classes = train[name, state], val[name, state], len(labelled.classes)
        [nearest] = representation.knn(x, train_labels, y, classes, [e.neighbours], e.temperature).values()
        linear = representation.probe(x, train_labels, y, classes, e.decay)
        found[name][state] |= {
            "knn": representation.accuracy(nearest, val_labels),
            "probe": representation.accuracy(linear, val_labels),
        }
    return found
