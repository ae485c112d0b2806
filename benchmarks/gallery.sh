#!/usr/bin/env bash
# The pictures of docs/gallery.md, from a comparison's folder and two runs without and with GRN; see there for how to
# make these. DATA/val: pictures for the numbers on GRN. Every other picture is of scikit-image's photographs.
#
#   benchmarks/gallery.sh COMPARISON RUN_WITHOUT_GRN RUN_WITH_GRN DATA OUT
set -euo pipefail

if [ $# -ne 5 ]; then
    echo "usage: $0 COMPARISON RUN_WITHOUT_GRN RUN_WITH_GRN DATA OUT" >&2
    exit 2
fi
comparison=$1 none=$2 grn=$3 data=$4 out=$5
python=${PYTHON:-python}

"$python" -m fcmae.visualize "$comparison" --images sample --count 3 --out "$out/looks"
"$python" -m fcmae.analyze "$none" "$grn" "$none@random" --labels "V1: no GRN" "V2: GRN" "V1, random" \
    --what cosine-distance activations --images "$data/val" --count 64 --out "$out/grn"
"$python" -m fcmae.analyze "$comparison" --images sample --out "$out/laptop" \
    --what activations attention-distance position-similarity filters mask-sensitivity cka
"$python" -m fcmae.analyze "$comparison" --images sample --out "$out/large" --what receptive-field --image-size 224

"$python" - "$out" "$(dirname "$0")/../docs/gallery" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image

out, gallery = map(Path, sys.argv[1:])
gallery.mkdir(exist_ok=True)
pictures = {path.stem: path for path in (out / "laptop").glob("*.png")}
pictures |= {
    "reconstructions": out / "looks" / "random_0.6.png",
    "grn": out / "grn" / "cosine-distance.png",
    "receptive-field": out / "large" / "receptive-field.png",
}
for name, path in pictures.items():
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((1000, 1400))
    # Median cut, the default, gives thin lines of different colours the same one.
    small.quantize(256, method=Image.Quantize.FASTOCTREE).save(gallery / f"{name}.png", optimize=True)
PYTHON
