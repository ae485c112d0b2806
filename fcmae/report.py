"""What a conversion says of itself: source, model, target, and each key that is left out, added or reshaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fcmae.layouts import Layout
from fcmae.layouts.sizes import Spec
from fcmae.weights import Weights


def describe(
    weights: Weights, layout: Layout, state: dict[str, Tensor], spec: Spec, target: str, say: Callable[[str], None]
) -> None:
    """`say` the lines. state: what goes into the target, in this toolkit's layout. target: what that is, in words."""
    source = weights.layout
    say(f"source    {weights.path}: {source.name} layout ({source.text}), {len(weights.state)} tensors, {weights.spec}")
    if source.licence:
        say(f"licence   {source.licence}")
    made = layout.from_fcmae(state)
    parameters = sum(x.numel() for x in state.values())
    say(f"target    {target}, {len(made)} tensors, {parameters:,} parameters, {spec}")
    theirs: dict[str, list[str]] = {}
    for key in weights.state:
        theirs.setdefault(source.whole(key), []).append(key)
    names = {key: layout.parts(key) for key in state}
    added = [_shaped(made, names[key]) for key in state if key not in theirs]
    reshaped = [
        f"{_shaped(weights.state, theirs[key])} -> {_shaped(made, names[key])}"
        for key in state
        if key in theirs and [weights.state[k].shape for k in theirs[key]] != [made[k].shape for k in names[key]]
    ]
    left_out = [name for key in weights.ours if key not in state for name in theirs[key]]
    lists = {"ignored": list(weights.ignored), "left out": left_out, "added": added, "reshaped": reshaped}
    for what, keys in lists.items():
        if keys:
            say("\n            ".join([f"{what:<9} {len(keys)}:", *keys]))


def _shaped(state: dict[str, Tensor], keys: Sequence[str]) -> str:
    """Keys with their shapes: several where one tensor of the other layout is kept in parts."""
    return ", ".join(f"{key} {tuple(state[key].shape)}" for key in keys)
