"""Which model a state dict holds, read from its shapes, and whether it is whole."""

from __future__ import annotations

from torch import Tensor

from fcmae.errors import UsageError
from fcmae.layouts.convnext_spec import ConvNextSpec
from fcmae.layouts.sizes import Spec, Told
from fcmae.layouts.vit_spec import VitSpec


def read_spec(state: dict[str, Tensor], where: str, told: Told | None = None) -> Spec:
    """The sizes of a state dict in this toolkit's layout; told: what its tensors do not tell.

    Raises UsageError, naming the tensors, when some are missing, too many, or of shapes that do not belong together.
    """
    cls = VitSpec if "cls_token" in state else ConvNextSpec
    try:
        spec = cls.read(state, told or Told())
        wanted = spec.shapes()
    except (KeyError, IndexError, ValueError, TypeError) as error:
        what = f"{error} is not there" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{where} holds no whole {cls.title} encoder: {what}") from None
    faults = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unknown": sorted(state.keys() - wanted.keys()),
        "of another size": [
            f"{key} is {tuple(state[key].shape)} where {tuple(shape)} belongs"
            for key, shape in wanted.items()
            if key in state and state[key].shape != shape
        ],
    }
    said = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in faults.items() if keys]
    if said:
        raise UsageError(f"{where} is no whole {spec.name or spec.title}: {'; '.join(said)}")
    return spec


def _some(names: list[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
