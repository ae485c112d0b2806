"""A whole training checkpoint in another layout: the weights and the optimizer's moments of each of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def translate(payload: dict, layout: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict:
    """`payload`, its model and optimizer state renamed and reshaped by `layout`, such as `minkowski.to_fcmae`.

    Layouts only permute elements, so translating back gives the same payload bit for bit.
    """
    state, groups = dict(payload["optimizer"]["state"]), []
    for group in payload["optimizer"]["param_groups"]:
        names = []
        for index, name in zip(group["params"], group["param_names"], strict=True):
            [(new, _)] = layout({name: payload["model"][name]}).items()
            names.append(new)
            if index in state:
                state[index] = {
                    key: layout({name: x})[new] if x.ndim else x  # "step" is a number
                    for key, x in state[index].items()
                }
        groups.append({**group, "param_names": names})
    optimizer = {**payload["optimizer"], "state": state, "param_groups": groups}
    return {**payload, "model": layout(payload["model"]), "optimizer": optimizer}


def in_order_of(saved: dict, current: dict) -> dict:
    """An optimizer's state dict with its parameters in the order in which another optimizer holds the same ones."""
    index, state, groups = {}, {}, []
    for group in saved["param_groups"]:
        index.update(zip(group["param_names"], group["params"], strict=True))
    for theirs, ours in zip(saved["param_groups"], current["param_groups"], strict=True):
        for i, name in zip(ours["params"], ours["param_names"], strict=True):
            if index[name] in saved["state"]:
                state[i] = saved["state"][index[name]]
        groups.append({**theirs, "params": ours["params"], "param_names": ours["param_names"]})
    return {**saved, "state": state, "param_groups": groups}
