"""Validating a classifier, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from fcmae.downstream import checks, export
from fcmae.downstream.data import open_val
from fcmae.downstream.evaluation import validate
from fcmae.downstream.settings import FinetuneConfig, crop_pct, image_size
from fcmae.downstream.start import Start, build, find_start
from fcmae.errors import UsageError
from fcmae.pretrain import worker_count
from fcmae.train import distributed


def evaluate(config: FinetuneConfig) -> int:
    """Validate a fine-tuned file or run. Writes nothing but, where `out` is set, eval.json, eval_per_class.json and
    eval_confusion.png there."""
    config = copy.deepcopy(config)
    if config.init is None and config.out is not None and (Path(config.out) / "validation.jsonl").is_file():
        config.init = config.out
    if config.init is None:
        raise UsageError("--eval needs a classifier: init=FILE, or out=RUN of a fine-tuned run")
    start = find_start(config)
    if start.spec.classes is None:
        raise UsageError(f"init={config.init} has no classifier to validate: fine-tune it first")
    adopt(config, start)
    checks.check(config, training=False)
    with distributed.joined(config) as world:
        given = start.about.get("classes")
        labelled = open_val(config.data.val, config.model.in_chans, given, start.spec.classes, f"init={config.init}")
        model = build(start, start.spec.classes, config).to(world.device)
        found, scores = validate(model, config, labelled, world, worker_count(config.data.workers))
    if world.is_main:
        size = image_size(config)
        seen = {"image_size": list(size), "crop_pct": crop_pct(config, size), "crop_mode": config.data.crop_mode}
        print(json.dumps(scores | seen, indent=1))
        if config.out is not None:
            folder = Path(config.out)
            folder.mkdir(parents=True, exist_ok=True)
            export.write_tables(folder, found, labelled.classes, scores, "eval_")
            export.write_json(folder / "eval.json", {"init": config.init, "val": config.data.val, **scores, **seen})
    return 0


def adopt(config: FinetuneConfig, start: Start) -> None:
    """Take over what fine-tuning wrote beside the file, where the configuration does not say otherwise."""
    about, fresh = start.about, FinetuneConfig()
    if start.is_vit:
        config.model.pool = "avg" if start.spec.fc_norm else "token"
    if config.model.image_size is None and about:
        config.model.image_size = about["image_size"]
    for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
        if getattr(config.data, key) == getattr(fresh.data, key) and key in about:
            setattr(config.data, key, about[key])
