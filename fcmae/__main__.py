"""`python -m fcmae` names the commands; `--version` the version."""

import sys

from fcmae import __version__

COMMANDS = {
    "fcmae.pretrain": "pretrain a masked autoencoder: CONFIG.yaml [key=value ...]",
    "fcmae.finetune": "a classifier from pretrained weights: CONFIG.yaml [key=value ...] [--eval]; --table RUN ...",
    "fcmae.probe": "how good frozen features are: CONFIG.yaml --mode linear, partial or knn [key=value ...]",
    "fcmae.compare": "pretrain models on the same images, crops and masks, and report: CONFIG.yaml [key=value ...]",
    "fcmae.visualize": "reconstructions at several mask ratios, as pictures and one page: RUN ... --out DIR",
    "fcmae.analyze": "look inside encoders: RUN_OR_WEIGHTS ... --what cosine-distance, activations, ... --out DIR",
    "fcmae.convert": "weights from one layout to another: SRC DST --to timm, hf, onnx, official, ...",
}

if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        print(__version__)
        sys.exit()
    wide = max(map(len, COMMANDS))
    for name, what in COMMANDS.items():
        print(f"python -m {name:<{wide}}  {what}")
    if len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help"):
        print(f"fcmae: error: {sys.argv[1]!r} follows no command; use one of the above", file=sys.stderr)
        sys.exit(2)
