"""timm models that begin from an encoder: pretrained, fine-tuned, or random as its pretraining begins."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fcmae.downstream.settings import DownstreamConfig, image_size
from fcmae.errors import UsageError, nearest
from fcmae.layouts import FAMILIES
from fcmae.layouts.positions import grid_of, resampled
from fcmae.layouts.running import timm_model
from fcmae.layouts.sizes import Spec, Told
from fcmae.layouts.spec import read_spec
from fcmae.layouts.timm import with_norm
from fcmae.layouts.vit_spec import VitSpec
from fcmae.masking import grid_size
from fcmae.models import MODELS, create_model
from fcmae.train.run_folder import RunFolder
from fcmae.weights import read_weights

HEAD_STD = 0.02  # of a new classifier's weights, times model.head_init_scale


@dataclass(frozen=True)
class Start:
    """An encoder, and the classifier it may come with. ours: under this toolkit's names. about: what fine-tuning wrote
    beside the file; said: a line for the run's head."""

    spec: Spec
    ours: dict[str, Tensor]
    about: dict
    said: str

    @property
    def is_vit(self) -> bool:
        return isinstance(self.spec, VitSpec)


def find_start(config: DownstreamConfig) -> Start:
    """What `init` names, or without it `model.name` with random weights.

    Raises UsageError for a file without an encoder, or of another model than model.name says.
    """
    if config.init is None and (config.resume is None or config.model.name is not None):
        return _random(config)
    source = config.init or config.resume  # whose weights a checkpoint brings itself; this tells the model
    path = best_file(Path(source))
    about = about_file(path)
    weights = read_weights(path, told=told_by(about))
    spec, name = weights.spec, config.model.name
    if name is not None:
        _known(name)
    if name not in (None, spec.name):
        raise UsageError(f"init={source} holds {spec}; model.name={name} is another model: leave out one of the two")
    if spec.in_chans != config.model.in_chans:
        raise UsageError(
            f"init={source} is for {spec.in_chans} channels and model.in_chans={config.model.in_chans}; "
            f"python -m fcmae.convert {source} DST --in-chans {config.model.in_chans} makes a stem for it"
        )
    kept = {key: x.float() for key, x in weights.ours.items() if spec.part(key) != "decoder"}
    return Start(dataclasses.replace(spec, decoder=None), kept, about, f"encoder from {path}")


def build(start: Start, classes: int, config: DownstreamConfig) -> nn.Module:
    """timm's model with the weights of `start` and a classifier of so many classes, in training mode.

    The start's own classifier stays where it has as many. A ViT's positions are resampled to the image size; one that
    averages its patches has a new norm after the mean, as MAE's code, where the start has none. Random numbers: of
    torch's generator. Raises UsageError for an image size that the model cannot have.
    """
    size, average = image_size(config), config.model.pool == "avg"
    spec, ours = dataclasses.replace(start.spec, classes=classes or None), dict(start.ours)
    if start.is_vit:
        rows, columns = grid_size(size, spec.patch_size)
        ours["pos_embed"] = _positions(start, (rows, columns), config)
        spec = dataclasses.replace(spec, size=size, tokens=rows * columns, fc_norm=average)
        if average != start.spec.fc_norm:  # a norm that sees something else
            ours = {key: x for key, x in ours.items() if not key.startswith(("norm.", "fc_norm."))}
    elif min(size) < 32:
        raise UsageError(f"model.image_size={config.model.image_size}: a ConvNeXt needs 32 pixels a side")
    else:
        ours = with_norm(ours)
    if start.spec.classes != classes:
        ours = {key: x for key, x in ours.items() if not key.startswith("head.")}
    state = FAMILIES[spec.family]["timm"].from_fcmae(ours)
    model = timm_model(spec, state, drop_path_rate=config.model.drop_path)
    if classes:
        new_head(model.get_classifier(), HEAD_STD * config.model.head_init_scale)
    model.load_state_dict(model.state_dict() | state, strict=True)
    return model.train()


def new_head(head: nn.Linear, std: float) -> None:
    """A classifier that knows nothing: truncated normal weights, no bias."""
    nn.init.trunc_normal_(head.weight, std=std) if std else nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)


def _random(config: DownstreamConfig) -> Start:
    """The encoder as pretraining would begin it, by the seed."""
    _known(config.model.name)
    [name] = [name for name, named in MODELS.items() if named.timm == config.model.name]
    vit = name.startswith("mae_")
    decoder = {"decoder_dim": 16, "decoder_depth": 0} | ({"decoder_heads": 1} if vit else {})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        # Of a few patches the ratio that pretraining has by default may leave none; nothing is masked here.
        size = {"image_size": image_size(config), "mask_ratio": 0.5} if vit else {}
        model = create_model(name, in_chans=config.model.in_chans, **size, **decoder)
    told = Told(model.heads, 1, model.image_size) if vit else None
    spec = read_spec(model.state_dict(), name, told)
    ours = {key: x for key, x in model.state_dict().items() if spec.part(key) != "decoder"}
    return Start(dataclasses.replace(spec, decoder=None), ours, {}, f"random weights, seed {config.seed}")


def _known(name: str) -> None:
    """Raises UsageError listing near names where timm's model has no pretraining here."""
    known = {named.timm: None for named in MODELS.values()}
    if name not in known:
        raise UsageError(f"unknown model.name={name}{nearest(name, known)}; known: {', '.join(known)}")


def _positions(start: Start, grid: tuple[int, int], config: DownstreamConfig) -> Tensor:
    spec, found = start.spec, start.ours["pos_embed"]
    if spec.size is None and grid[0] * grid[1] != spec.tokens:
        raise UsageError(
            f"init={config.init}: no tensor tells the sides of the {spec.tokens} patches it has positions for; "
            f"python -m fcmae.convert {config.init} DST --image-size H W asks for them"
        )
    old = grid if spec.size is None else grid_of(spec.size, spec.patch_size)
    return found if old == grid else resampled(found, old, grid)


def best_file(path: Path) -> Path:
    """The best weights of a fine-tuned run's folder; otherwise the path itself."""
    best = path / "best.safetensors"
    if path.is_dir() and RunFolder(path).validation.is_file():
        if not best.is_file():
            raise UsageError(f"{path} is a run without a validation yet; it has no best.safetensors")
        return best
    return path


def told_by(about: dict) -> Told:
    """What no tensor of a fine-tuned ViT tells."""
    arguments = about.get("timm", {})
    if "img_size" not in arguments:
        return Told()
    return Told(arguments.get("num_heads"), None, tuple(arguments["img_size"]))


def about_file(path: Path) -> dict:
    """What `export` wrote beside a file of weights; nothing where something else did."""
    file = path.with_suffix(".json")
    if path.suffix != ".safetensors" or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is not readable: {error}") from None
    return found if isinstance(found, dict) and found.get("format") == "fcmae-classifier-1" else {}
