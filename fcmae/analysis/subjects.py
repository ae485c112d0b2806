"""What is analysed: a run of this toolkit, any weights that fcmae.convert reads, or a model of timm."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fcmae import config as settings
from fcmae.analysis.blocks import blocks_of, dense, patch_grid
from fcmae.data.transforms import stats
from fcmae.downstream.start import about_file, best_file, told_by
from fcmae.errors import UsageError, nearest
from fcmae.layouts.vit_spec import VitSpec
from fcmae.masking import grid_size
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.support import MINKOWSKI
from fcmae.pretrain import build_model
from fcmae.schema import Config
from fcmae.train.init import start_from
from fcmae.weights import CHECKPOINT, Weights, load_tensors, read_weights

RANDOM = "@random"
TIMM = "timm:"
SIZE = (224, 224)  # of images for weights that are of no size


@dataclass(frozen=True)
class Subject:
    """A network and how to feed it.

    network: encodes whole images, a MaskedAutoencoder or a model of timm, in evaluation. image_size, in_chans, mean,
    std: of the images that it takes. autoencoder: the same as it was pretrained, to run on masked images; None for
    timm's. decoder: whether that has the decoder it was pretrained with. run: the settings of a run. text: what it is.
    """

    label: str
    source: str
    text: str
    network: nn.Module
    image_size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    autoencoder: MaskedAutoencoder | None = None
    decoder: bool = False
    run: Config | None = None

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """Its blocks by name, from first to last."""
        return blocks_of(self.network)

    @property
    def patch(self) -> tuple[int, int] | None:
        """Height and width in pixels of a ViT's patch; None for other networks."""
        grid = self.grid
        return None if grid is None else (self.image_size[0] // grid[0], self.image_size[1] // grid[1])

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of a ViT's patches; None for other networks."""
        return patch_grid(self.network, self.image_size)

    def batches(self, images: Tensor, size: int) -> Iterator[Tensor]:
        """Images (N, C, H, W) on the device, `size` at a time."""
        return (part.to(self.device) for part in images.split(size))

    def about(self) -> dict:
        """For reports."""
        return {"source": self.source, "what": self.text, "image_size": list(self.image_size)}


def open_subjects(
    names: list[str], labels: list[str] | None, size: tuple[int, int] | None, device: torch.device, seed: int
) -> list[Subject]:
    """The subjects that a command line names; of the folder of a comparison, each of its arms.

    size: of the images, in place of each subject's own. seed: of random weights where no run tells one. Raises
    UsageError for what cannot be read, and where there are fewer or more labels than subjects.
    """
    names = [each for name in names for each in _arms(name)]
    if labels is not None and len(labels) != len(names):
        raise UsageError(f"--labels names {len(labels)} and there are {len(names)} subjects: {', '.join(names)}")
    labels = labels or _labels(names)
    if len(set(labels)) < len(labels):
        raise UsageError(f"two subjects are called the same ({', '.join(labels)}); tell them apart with --labels")
    return [open_subject(name, label, size, device, seed) for name, label in zip(names, labels, strict=True)]


def open_subject(name: str, label: str, size: tuple[int, int] | None, device: torch.device, seed: int) -> Subject:
    """One subject; see `open_subjects`."""
    random = name.endswith(RANDOM) and not Path(name).exists()
    source = name.removesuffix(RANDOM) if random else name
    if source.startswith(TIMM):
        return _timm(source.removeprefix(TIMM), label, name, size, device, None if not random else seed)
    if not Path(source).exists():
        import timm

        hint = f"; timm's model is {TIMM}{source}" if timm.is_model(source) else ""
        raise UsageError(f"no run's folder and no file is called {source}{hint}")
    path = best_file(Path(source))
    config, about = _run_config(path), about_file(path)
    weights = None if config else read_weights(path, told=told_by(about))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed if config else seed)
            model = _build(config, size) if config else _from_spec(weights, size)
        if not random:
            start_from(model, str(path))
    except UsageError as error:
        raise UsageError(f"{source}: {str(error).replace(f'init={path}', str(path))}") from None
    text = config.model.name if config else str(weights.spec)
    if not config and weights.spec.decoder:
        text += "; taken for one of normalized pixels (loss.norm_pix), which no file tells"
    given = (config.data.mean, config.data.std) if config else (about.get("mean"), about.get("std"))
    mean, std = stats(model.in_chans, *given)
    model = model.to(device).eval()
    network = dense(copy.deepcopy(model) if getattr(model, "grn", "") == "batch" else model)
    pixels = size or (model.image_size if config or model.fixed_size else tuple(about.get("image_size", SIZE)))
    return Subject(
        label, name, f"{text}, random weights" if random else text, network, pixels, model.in_chans, mean, std, device,
        model, bool(config or weights.spec.decoder), config,
    )  # fmt: skip


def _build(config: Config, size: tuple[int, int] | None) -> MaskedAutoencoder:
    """A run's model on this toolkit's kernels: its blocks can be watched, and the result is the same."""
    config = copy.deepcopy(config)
    if config.sparse.backend == MINKOWSKI:
        config.sparse.backend = "auto"
    config.model.image_size = list(size or settings.sides(config.model.image_size))
    return build_model(config)


def _from_spec(weights: Weights, size: tuple[int, int] | None) -> MaskedAutoencoder:
    """A model of a file's sizes, of images of `size`."""
    spec = weights.spec
    if isinstance(spec, VitSpec):
        if spec.heads is None:
            raise UsageError("no tensor tells the attention heads of this ViT; give the run or checkpoint it is from")
        if spec.decoder and spec.decoder_heads is None:
            raise UsageError(
                "no tensor tells the attention heads of this decoder; give the run or checkpoint it is from"
            )
        if size is not None:
            rows, columns = grid_size(size, spec.patch_size)
            spec = replace(spec, size=size, tokens=rows * columns)
    else:
        grid_size(size or SIZE, 32)
        spec = replace(spec, size=size or spec.size)
    return spec.make()


def _run_config(path: Path) -> Config | None:
    """The settings of a pretraining run, from its folder or a checkpoint; None for other weights."""
    if path.is_dir():
        file = path / "config.yaml"
        found = settings.read_yaml(file) if file.is_file() and (path / "checkpoints").is_dir() else None
        where = file
    elif path.suffix in (".pt", ".pth") and path.is_file():
        data = load_tensors(path)
        found = data.get("config") if isinstance(data, dict) and data.get("format") == CHECKPOINT else None
        where = path
    else:
        return None
    if not isinstance(found, dict) or "mask" not in found:  # fine-tuning has none
        return None
    return settings.override(Config(), found, str(where))


def _timm(
    name: str, label: str, source: str, size: tuple[int, int] | None, device: torch.device, seed: int | None
) -> Subject:
    import timm

    if not timm.is_model(name):
        hint = nearest(name.split(".")[0].partition("@")[0], timm.list_models())
        more = f"; random weights: {source.partition('@')[0]}{RANDOM}" if "@" in name else ""
        raise UsageError(f"timm has no model {name!r}{hint}{more}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed or 0)
            network = timm.create_model(name, pretrained=seed is None)
    except Exception as error:  # of a missing network, file or entry each library raises its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if seed is not None:
            raise UsageError(f"timm:{name}: {reason}") from None
        raise UsageError(
            f"timm:{name}: its pretrained weights could not be had ({reason}); timm:{name}{RANDOM} needs none"
        ) from None
    told = network.pretrained_cfg or {}
    chans, *pixels = told.get("input_size", (3, *SIZE))
    mean, std = stats(chans, told.get("mean"), told.get("std"))
    text = f"timm's {name}, {'random weights' if seed is not None else told.get('tag') or 'pretrained'}"
    if size and hasattr(network, "set_input_size"):  # of ViTs and their like, whose positions are resampled
        for side in getattr(getattr(network, "patch_embed", None), "patch_size", ()):
            grid_size(size, side)
        network.set_input_size(img_size=size)
    return Subject(label, source, text, network.to(device).eval(), size or tuple(pixels), chans, mean, std, device)


def _arms(name: str) -> list[str]:
    """The runs of a comparison's folder; otherwise the name itself."""
    random = RANDOM if name.endswith(RANDOM) else ""
    folder = Path(name.removesuffix(RANDOM)) / "arms"
    if not folder.is_dir():
        return [name]
    found = [f"{path}{random}" for path in sorted(folder.iterdir()) if path.is_dir()]
    if not found:
        raise UsageError(f"{folder} has no runs yet; give a comparison that has begun")
    return found


def _labels(names: list[str]) -> list[str]:
    """The last part of each path, with as many before as tell them apart."""
    parts = [[name.replace(RANDOM, ", random")] if name.startswith(TIMM) else _words(name) for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-count:]) for each in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _words(name: str) -> list[str]:
    *lead, last = Path(name.removesuffix(RANDOM)).resolve().parts
    return [*lead, f"{last}, random" if name.endswith(RANDOM) else last]
