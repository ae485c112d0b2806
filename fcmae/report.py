"""What a conversion says of itself: source, model, target, and each key that is left out, added or reshaped."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fcmae.layouts import Layout
from fcmae.layouts.spec import Spec
from fcmae.weights import Weights

LICENCE = "the authors' published ConvNeXt V2 weights are under CC BY-NC 4.0: not for commercial use"


def describe(
    weights: Weights, layout: Layout, state: dict[str, Tensor], spec: Spec, target: str, say: Callable[[str], None]
) -> None:
    """`say` the lines. state: what goes into the target, in this toolkit's layout. target: what that is, in words."""
    source = weights.layout
    say(f"source    {weights.path}: {source.name} layout ({source.text}), {len(weights.state)} tensors, {weights.spec}")
    if source.name in ("official", "dense") or (source.name == "minkowski" and not weights.spec.decoder):
        say(f"licence   {LICENCE}")
    parameters = sum(x.numel() for x in state.values())
    say(f"target    {target}, {len(state)} tensors, {parameters:,} parameters, {spec}")
    theirs = {source.names.ours(key) or key: key for key in weights.state}
    made = layout.from_fcmae(state)
    names = dict(zip(state, made, strict=True))
    added = [f"{names[key]} {tuple(made[names[key]].shape)}" for key in state if key not in theirs]
    reshaped = [
        f"{theirs[key]} {tuple(weights.state[theirs[key]].shape)} -> {name} {tuple(made[name].shape)}"
        for key, name in names.items()
        if key in theirs and weights.state[theirs[key]].shape != made[name].shape
    ]
    left_out = [theirs[key] for key in weights.ours if key not in state]
    lists = {"ignored": list(weights.ignored), "left out": left_out, "added": added, "reshaped": reshaped}
    for what, keys in lists.items():
        if keys:
            say("\n            ".join([f"{what:<9} {len(keys)}:", *keys]))
