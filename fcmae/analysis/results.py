"""What an analysis leaves: WHAT.png, WHAT.json with every number that the picture shows, and a TensorBoard entry."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from fcmae.errors import UsageError
from fcmae.files import aside, write_whole

FORMAT = "fcmae-analysis-1"
EVENTS = "events.out.tfevents."
SAVING = {"format": "png", "bbox_inches": "tight", "pad_inches": 0.1}


def check_out(out: Path, whats: list[str]) -> None:
    """Raises UsageError where `out` has something of these names that no analysis wrote, or cannot be a folder."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    for what in whats:
        report, picture, events = _paths(out, what)
        try:
            known = json.loads(report.read_text()).get("format") == FORMAT
        except FileNotFoundError:
            known = False
        except (OSError, ValueError, AttributeError):
            known = False
        for path in (report, picture, events):
            if path.exists() and not known:
                raise UsageError(f"{path} was not written by fcmae.analyze; choose another --out")
        if events.exists() and not all(p.name.startswith(EVENTS) for p in events.iterdir()):
            raise UsageError(f"{events} holds files that TensorBoard did not write; choose another --out")


def write(out: Path, what: str, report: dict, figure) -> Path:
    """Write one analysis, over an earlier one; the picture's path. Raises UsageError where that fails."""
    path, picture, events = _paths(out, what)
    try:
        events.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write into --out {out}: {error.strerror}; choose another folder") from None
    buffer = io.BytesIO()
    figure.savefig(buffer, **SAVING)
    text = json.dumps({"format": FORMAT, "what": what, **report}, indent=1, allow_nan=False)
    text = re.sub(r"\[[-+\d.e,\s]+\]", lambda found: " ".join(found[0].split()), text)  # a list of numbers is a line
    write_whole(path, lambda file: file.write(text.encode()))
    write_whole(picture, lambda file: file.write(buffer.getvalue()))
    with aside(events) as part:
        _to_tensorboard(part, what, buffer, text)
    return picture


def _to_tensorboard(folder: Path, what: str, picture: io.BytesIO, text: str) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    with Image.open(picture) as image:
        writer.add_image(f"analyze/{what}", np.asarray(image.convert("RGB")), dataformats="HWC")
    shown = text if len(text) < 20_000 else f"{text[:20_000]}\n... the rest is in {what}.json"
    writer.add_text(f"analyze/{what}", f"```\n{shown}\n```")
    writer.close()


def _paths(out: Path, what: str) -> tuple[Path, Path, Path]:
    return out / f"{what}.json", out / f"{what}.png", out / "tensorboard" / what
