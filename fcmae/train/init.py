"""Starting from weights that something else trained."""

from __future__ import annotations

from torch import nn

from fcmae.errors import UsageError
from fcmae.layouts import LAYOUTS
from fcmae.layouts.spec import read_spec
from fcmae.weights import read_weights


def start_from(model: nn.Module, path: str) -> str:
    """Load the encoder of any file that `fcmae.convert` reads, and its decoder where both have the same one.

    Returns a line that says what was taken. Raises UsageError when the encoder is of another size.
    """
    weights = read_weights(path)
    own = LAYOUTS["minkowski"].to_fcmae(model.state_dict())
    here, there = read_spec(own, "the model"), weights.spec
    if (here.in_chans, here.encoder) != (there.in_chans, there.encoder):
        hint = (
            f"python -m fcmae.convert {path} DST --in-chans {here.in_chans} makes a stem for it"
            if here.encoder == there.encoder
            else "set model.name, or the sizes under model., to what the file holds"
        )
        raise UsageError(f"init={path} holds {there}; the model is {here}: {hint}")
    whole = here.decoder == there.decoder
    taken = {key: x for key, x in weights.ours.items() if key in own and (whole or here.part(key) == "encoder")}
    model.load_state_dict(own | taken, strict=True)
    if whole:
        return f"encoder and decoder from {path}"
    return f"encoder from {path}; the decoder starts anew, there {'is none' if not there.decoder else 'it is another'}"
