"""kNN and logistic regression on the features of a frozen encoder, which are kept in the run's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fcmae.checksum import write_safetensors
from fcmae.downstream import representation
from fcmae.downstream.evaluation import batches
from fcmae.downstream.labelled import Labelled
from fcmae.downstream.settings import ProbeConfig, crop_pct, image_size
from fcmae.downstream.start import Start
from fcmae.errors import UsageError
from fcmae.pretrain import worker_count
from fcmae.train.distributed import World
from fcmae.weights import load_tensors

MOST = 10**10  # multiplications of one of the regression's 200 evaluations or more: minutes on a CPU


def encode(model: nn.Module, pool: str, images: Tensor) -> Tensor:
    """Images (B, C, H, W) to features (B, D): the mean over positions, or of a ViT with pool=token the class token."""
    found = model.forward_features(images)
    if found.ndim == 3 and not isinstance(model.fc_norm, nn.Identity):  # fine-tuned to average
        return model.forward_head(found, pre_logits=True)
    return found[:, 0] if found.ndim == 3 and pool == "token" else representation.pooled(found)


def cached_features(
    model: nn.Module, start: Start, config: ProbeConfig, labelled: Labelled, folder: Path, world: World
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Of "train" and "val": features (N, D) in fp32, labels (N,), and how many images could not be read; on rank 0.

    Every rank encodes its share. What is in `folder` is taken where weights, images and crops are the same.
    """
    key, found = _key(start, config), {}
    for part, files in (("train", labelled.train), ("val", labelled.val)):
        name = hashlib.sha256(f"{key} {files}".encode(errors="surrogateescape")).hexdigest()[:16]
        path = folder / f"{part}_{name}.safetensors"
        if not world.on_main(path.is_file):
            _extract(model, config, files, path, world)
        if world.is_main:
            tensors = load_tensors(path)
            found[part] = tensors["features"], tensors["labels"], int(tensors["unreadable"])
            for old in folder.glob(f"{part}_*.safetensors"):
                if old != path:
                    old.unlink()
    return found


def measure(
    found: dict[str, tuple[Tensor, Tensor, int]], classes: int, config: ProbeConfig, device: torch.device
) -> dict[str, dict]:
    """Accuracies on the validation features of kNN with each number of neighbours and of logistic regression.

    Of more features times classes than MOST the latter is left out: linear probing is for that.
    """
    (x, labels, _), (y, truth, _), p = found["train"], found["val"], config.probe
    votes = representation.knn(x, labels, y, classes, p.neighbours, p.temperature, device)
    rows = {f"knn_{k}": representation.accuracy(taken, truth) for k, taken in votes.items()}
    if x.numel() * classes <= MOST:
        rows["logistic"] = representation.accuracy(representation.probe(x, labels, y, classes, p.decay), truth)
    return rows


def _extract(model: nn.Module, config: ProbeConfig, files: list[tuple[str, int]], path: Path, world: World) -> None:
    """Encode this rank's share of the files; rank 0 puts all shares into their order and writes them."""
    encoder: Callable[[Tensor], Tensor] = partial(encode, model.eval(), config.model.pool)
    share = batches(config, files, world, worker_count(config.data.workers))
    if world.is_main:
        part = path.stem.partition("_")[0]
        print(f"encoding {len(files)} images of data.{part}", flush=True)
        share = tqdm(share, part, unit="batch", disable=None, dynamic_ncols=True)
    features, labels, unreadable = representation.features({"encoder": encoder}, share, world.device)
    mine = path.with_name(f".{path.stem}.rank{world.rank}.safetensors")
    counted = torch.tensor(unreadable)
    write_safetensors(mine, {"features": features["encoder"], "labels": labels, "unreadable": counted})
    world.gathered([None])  # until every share is written

    def join() -> None:
        shares = [path.with_name(f".{path.stem}.rank{r}.safetensors") for r in range(world.size)]
        parts = [load_tensors(share) for share in shares]
        width = max(part["features"].shape[1] for part in parts)
        for share in shares:
            share.unlink()
        if not width:
            raise UsageError(f"no image of data.{path.stem.split('_')[0]} could be read")
        whole = [part["features"].reshape(-1, width) for part in parts]
        write_safetensors(
            path,
            {
                "features": torch.cat(whole),
                "labels": torch.cat([part["labels"] for part in parts]),
                "unreadable": sum(part["unreadable"] for part in parts),
            },
        )

    world.on_main(join)


def _key(start: Start, config: ProbeConfig) -> str:
    """What the features follow from, besides the images."""
    size = image_size(config)
    data = (size, crop_pct(config, size), config.data.crop_mode, config.data.interpolation, config.data.mean)
    digest = hashlib.sha256()
    for name, x in sorted(start.ours.items()):
        digest.update(name.encode() + x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{digest.hexdigest()} {config.model.pool} {data} {config.data.std}"
