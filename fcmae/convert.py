"""Weights from one layout to another: `python -m fcmae.convert SRC DST --to LAYOUT`.

SRC is told by its content: a run folder or checkpoint of this toolkit, a file of the authors, timm or transformers.
What is written was run beside its source on the same random images, and agreed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fcmae.checksum import write_safetensors
from fcmae.errors import UsageError
from fcmae.export import BATCHES, GRAPHS, run_hf, to_hf
from fcmae.files import aside, write_whole
from fcmae.layouts import FAMILIES, LAYOUTS, VIT_LAYOUTS, Layout, timm, training
from fcmae.layouts import stem as stems
from fcmae.layouts.running import Outputs, moved_by_timm, outputs
from fcmae.layouts.sizes import Spec, Told
from fcmae.layouts.spec import read_spec
from fcmae.layouts.vit_spec import VitSpec
from fcmae.report import describe
from fcmae.resizing import moved, pair, with_size
from fcmae.weights import Weights, read_checkpoint, read_weights

__all__ = ["convert", "main", "read_checkpoint"]

TARGETS = (*LAYOUTS, *GRAPHS)
SUFFIXES = {"onnx": (".onnx",), "exported": (".pt2",)}
HF_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", ".gitattributes", "README.md"}
TENSOR_FILES = (".safetensors", ".pt", ".pth")
TOLERANCE = 1e-5  # of the largest magnitude, between source and result
UNTENSORED = ("hf", *GRAPHS)  # these hold more of a model than its tensors
UNVERIFIED = "verified  no: --no-verify"


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0, or 2 with one line for bad input."""
    parser = argparse.ArgumentParser(
        "python -m fcmae.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", type=Path, help="weights of any known layout: a file, a run's or transformers' folder")
    parser.add_argument(
        "dst", type=Path, help=f"file to write ({', '.join(TENSOR_FILES)}, .onnx, .pt2), or hf's folder"
    )
    both = [[name, *(family[name].text for family in FAMILIES.values() if name in family)] for name in LAYOUTS]
    texts = ", ".join(f"{name}: {' or '.join(dict.fromkeys(of))}" for name, *of in both)
    parser.add_argument("--to", choices=TARGETS, default="timm", help=f"layout of DST ({texts}); default timm")
    parser.add_argument("--force", action="store_true", help="write over DST")
    parser.add_argument("--no-verify", action="store_true", help="do not run source and result on random images")
    parser.add_argument("--with-decoder", action="store_true", help="keep the decoder")
    parser.add_argument("--ema", action="store_true", help="take SRC's averaged weights")
    parser.add_argument("--in-chans", type=int, metavar="N", help="a stem for N channels")
    parser.add_argument(
        "--stem", choices=stems.MODES, default="mean", help="how --in-chans makes it: the mean of all kernels, the "
        "kernels in turn, or the first ones (docs/weights.md); default mean"
    )  # fmt: skip
    parser.add_argument(
        "--image-size", type=int, nargs="+", metavar="PX", help="one number or height and width: of hf, onnx, exported "
        "(default 224); of a ViT in any layout, its positions resampled (default as they are)"
    )  # fmt: skip
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads of a ViT whose file does not tell")
    parser.add_argument("--decoder-heads", type=int, metavar="N", help="and of its decoder")
    given = parser.parse_args(argv)
    options = {key: value for key, value in vars(given).items() if key not in ("src", "dst", "to", "no_verify")}
    try:
        convert(given.src, given.dst, given.to, verify=not given.no_verify, say=print, **options)
    except UsageError as error:
        print(f"fcmae.convert: error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(
    src: Path,
    dst: Path,
    to: str = "timm",
    *,
    force: bool = False,
    verify: bool = True,
    with_decoder: bool = False,
    ema: bool = False,
    in_chans: int | None = None,
    stem: str = "mean",
    image_size: int | Sequence[int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Convert as the command does; `say` gets the lines of its report, the last one when DST is written.

    Raises UsageError for what cannot be read, held by the target, or does not give the source's outputs; DST is then as
    it was.
    """
    check_target(dst, to, force)
    weights = read_weights(src, ema, Told(heads, decoder_heads))
    if not isinstance(weights.spec, VitSpec) and (heads, decoder_heads) != (None, None):
        raise UsageError(f"--heads and --decoder-heads are of a ViT; {src} holds a {weights.spec.title}")
    weights, size = with_size(weights, pair(image_size))
    state, spec, channels = weights.ours, weights.spec, None
    in_chans = None if in_chans == spec.in_chans else in_chans
    moves = isinstance(spec, VitSpec) and size != spec.image_size
    of_a_run = weights.training is not None and to in ("fcmae", "minkowski") and dst.suffix in (".pt", ".pth")
    if of_a_run and in_chans is None and not ema and not moves:
        return _whole_run(weights, to, dst, verify, say)
    if in_chans is not None:
        if with_decoder or in_chans < 1:
            raise UsageError(f"--in-chans {in_chans}: 1 or more, and without --with-decoder, which predicts pixels")
        state, channels = _with_stem(state, spec, in_chans, stem)
    layout = _target(spec, to, with_decoder)
    state = _parts(state, spec, layout, with_decoder)
    if layout.ends_in_norm:
        state = timm.with_norm(state)
    source = partial(outputs, weights.layout.name, weights.state, weights.spec)
    if moves:
        state = moved(state, spec, size, with_decoder)
    spec = read_spec(state, "the result", weights.told._replace(size=size) if moves else weights.told)
    if to in UNTENSORED and spec.untold:
        raise UsageError(f"--to {to} needs to know of this ViT what no tensor tells: {', '.join(spec.untold)}")
    kind = f"{to}, of timm's model" if to in GRAPHS else f"{to} layout ({layout.text})"
    describe(weights, layout, state, spec, f"{dst}: {kind}", say)
    if moves and verify:
        source = _by_timm(weights, source, size, say)
    made = {key: x.contiguous() for key, x in layout.from_fcmae(state).items()}
    check = partial(_check, source, spec, channels) if verify else None
    if to in GRAPHS:
        _graph(to, made, spec, dst, size, check, say)
    elif to == "hf":
        with aside(dst) as folder:
            _written(to_hf, made, spec, folder, size)
            say(check(partial(run_hf, folder, spec), spec.image_size) if check else UNVERIFIED)
    else:
        say(check(partial(outputs, to, made, spec), spec.image_size) if check else UNVERIFIED)
        _write_tensors(dst, made if dst.suffix == ".safetensors" else {"model": made})
    say(f"written   {dst}")


def check_target(dst: Path, to: str, force: bool) -> None:
    """Raises UsageError when DST exists, cannot be there, or is named as what it will not be."""
    if not dst.name:
        raise UsageError(f"{dst} is no name for what --to {to} writes")
    wanted, files = SUFFIXES.get(to, TENSOR_FILES), (*TENSOR_FILES, *sum(SUFFIXES.values(), ()))
    if to == "hf" and dst.suffix in files:
        raise UsageError(f"{dst}: --to hf writes a folder, named as one")
    if to != "hf" and dst.suffix not in wanted:
        raise UsageError(f"{dst}: --to {to} writes a file named *{' or *'.join(wanted)}")
    if not dst.parent.is_dir():
        raise UsageError(f"{dst.parent} is no folder to write {dst.name} into; make it first")
    if dst.exists() and not force:
        raise UsageError(f"{dst} exists; choose another name or give --force")
    replaced = dst.exists() and (to == "hf" or dst.is_dir())
    if replaced and not (dst.is_dir() and {p.name for p in dst.iterdir()} <= HF_FILES):
        raise UsageError(f"{dst} is no folder of weights alone, such as --to hf writes; --force does not replace it")


def _whole_run(weights: Weights, to: str, dst: Path, verify: bool, say: Callable[[str], None]) -> None:
    """A checkpoint that a run goes on from, optimizer and all, in the layout of another backend."""
    layout, spec = _target(weights.spec, to, with_decoder=True), weights.spec
    describe(weights, layout, weights.ours, spec, f"{dst}: {to} layout ({layout.text})", say)
    payload = training.translate(weights.training, layout.from_fcmae if to != "fcmae" else weights.layout.to_fcmae)
    run = partial(outputs, to, payload["model"], spec)
    source = partial(outputs, weights.layout.name, weights.state, spec)
    say(_check(source, spec, None, run, spec.image_size) if verify else UNVERIFIED)
    _write_tensors(dst, payload)
    say(f"written   {dst}, with the state of the optimizer: a run goes on from it with resume={dst}")


def _target(spec: Spec, to: str, with_decoder: bool) -> Layout:
    """The layout of a target that holds such a model; ONNX and torch.export begin with timm's."""
    layouts, name = FAMILIES[spec.family], "timm" if to in GRAPHS else to
    if name not in layouts:
        raise UsageError(f"--to {to} cannot hold a {spec.name or spec.title}; {', '.join(layouts)} can")
    # Whether there is a place for a decoder at all is another question.
    demands = spec.demands(with_decoder and "decoder" in layouts[name].holds)
    for need, text in demands.items():
        if need not in layouts[name].holds:
            able = [each for each, layout in layouts.items() if spec.demands(with_decoder).keys() <= layout.holds]
            raise UsageError(f"--to {to} cannot hold {text}; {', '.join(able)} can")
    return layouts[name]


def _parts(state: dict[str, Tensor], spec: Spec, layout: Layout, with_decoder: bool) -> dict[str, Tensor]:
    """What of the model goes into the target."""
    if with_decoder and "decoder" not in layout.holds:
        raise UsageError(f"--with-decoder: {layout.name} has no place for a decoder; fcmae and official, say, have")
    if with_decoder and spec.decoder is None:
        raise UsageError("--with-decoder: the source has no decoder")
    kept = {"encoder", *(layout.holds if with_decoder else layout.holds - {"decoder"})}
    return {key: x for key, x in state.items() if spec.part(key) in kept}


def _by_timm(weights: Weights, source: Callable, size: tuple[int, int], say: Callable) -> Callable[[Tensor], Outputs]:
    """The source at another size: timm's model of it, which gives what the source does, resampled by timm itself."""
    spec = weights.spec
    state = _parts(weights.ours, spec, VIT_LAYOUTS["timm"], False)
    own = partial(outputs, "timm", VIT_LAYOUTS["timm"].from_fcmae(state), replace(spec, decoder=None))
    say(_check(source, spec, None, own, spec.image_size))
    return moved_by_timm(state, replace(spec, decoder=None), size)


def _with_stem(state: dict[str, Tensor], spec: Spec, target: int, mode: str) -> tuple[dict[str, Tensor], Tensor]:
    channels = stems.channel_map(mode, spec.in_chans, target)
    state = {key: x for key, x in state.items() if spec.part(key) != "decoder"}
    return state | {spec.stem: stems.adapt(state[spec.stem], channels)}, channels


def _check(
    source: Callable[[Tensor], Outputs], spec: Spec, channels: Tensor | None, run: Callable[[Tensor], Outputs],
    size: tuple[int, int], batch: int = 2, tolerance: float = TOLERANCE,
) -> str:  # fmt: skip
    """Run `source` and `run` on the same random images; a line that says how far apart they are.

    channels: the `channel_map` of a changed stem, through which the source sees what the result sees.
    Raises UsageError where they differ by more than `tolerance` of the largest magnitude.
    """
    images = torch.randn(batch, spec.in_chans, *size, generator=torch.Generator().manual_seed(0))
    seen = images if channels is None else torch.einsum("bthw,ts->bshw", images, channels.float())
    expected, found = source(seen), run(images)
    worst = 0.0
    compared = [name for name in found if name in expected]
    for name in compared:
        scale = expected[name].abs().max().item()
        apart = (found[name] - expected[name]).abs().max().item() / (scale or 1.0)
        if not apart <= tolerance:  # nan included
            raise UsageError(
                f"the result's {name} differ from the source's by {apart:.3g} of the largest on random images, more "
                f"than {tolerance:g}: nothing was written (--no-verify writes it all the same)"
            )
        worst = max(worst, apart)
    what = ", ".join(compared)
    return f"verified  {what} of {batch} random images of {size[0]} x {size[1]} differ by {worst:.1e} of the largest"


def _graph(
    to: str,
    made: dict[str, Tensor],
    spec: Spec,
    dst: Path,
    size: tuple[int, int],
    check: Callable | None,
    say: Callable,
) -> None:
    """Write an ONNX or torch.export file, tried with several batch sizes."""
    write, run, tolerance = GRAPHS[to]
    name = "logits" if spec.classes else "features"
    with aside(dst) as path:
        _written(write, made, spec, path, size)

        def outputs_of(images: Tensor) -> Outputs:
            return {name: run(path, images)}

        for batch in BATCHES if check else ():
            say(check(outputs_of, size, batch=batch, tolerance=tolerance))
        if check is None:
            say(UNVERIFIED)


def _written(write: Callable, made: dict[str, Tensor], spec: Spec, path: Path, size) -> None:
    """Call another library's writer, which has errors of its own for a full disk."""
    try:
        write(made, spec, path, size)
    except (RuntimeError, SafetensorError) as error:
        raise UsageError(f"could not write {path}: {str(error).strip().splitlines()[0]}") from error


def _write_tensors(dst: Path, content: dict) -> None:
    if dst.suffix == ".safetensors":
        write_safetensors(dst, content)
    else:
        write_whole(dst, lambda file: torch.save(content, file))


if __name__ == "__main__":
    sys.exit(main())
