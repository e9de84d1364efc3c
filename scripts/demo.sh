#!/usr/bin/env bash
# Show the trained networks that ship on example images, then the whole path on generated data: generate, train,
# evaluate, load, segment, explain.
# Everything goes into the folder that is given (default: demo). Run it again to continue where it stopped.
set -euo pipefail
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
case "${1:-}" in
  "") out="$PWD/demo" ;;
  /*) out="$1" ;;
  *) out="$here/$1" ;;
esac
export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 # the demo needs no Hub

# A changed recipe starts another run, because the old one cannot resume with it.
run="$out/run-$(cksum < configs/run/smoke.yaml | cut -d ' ' -f 1)"

echo "1/7 segment example images with the networks that ship"
unconceal models
mkdir -p "$out/examples"
PYTHONPATH=space python - > "$out/examples/list.txt" <<'PY'
import os

from catalog import examples_of

from unconceal.hub.shipped import shipped_names

for name in shipped_names():
    print(name, *map(os.path.relpath, examples_of(name)))  # relative: the folder of the checkout may hold a space
PY
while read -r name files; do
  # Unquoted: one word for each file.
  unconceal segment $files --model "$name" --out "$out/examples/$name" --output overlay --overwrite < /dev/null
done < "$out/examples/list.txt"
python - "$out/examples" <<'PY'
import sys
from pathlib import Path

from PIL import Image, ImageOps

out, size = Path(sys.argv[1]), (320, 240)
pairs = [
    (image, out / name / f"{Path(image).stem}_overlay.png")
    for name, *images in map(str.split, (out / "list.txt").read_text().splitlines())
    for image in images
]
sheet = Image.new("RGB", (6 * size[0], -(-len(pairs) // 3) * size[1]), "white")
for i, files in enumerate(pairs):
    for j, file in enumerate(files):
        cell = ImageOps.pad(Image.open(file).convert("RGB"), size, color="white")
        sheet.paste(cell, ((2 * (i % 3) + j) * size[0], i // 3 * size[1]))
sheet.save(out / "sheet.png")
PY
echo "images, and what the networks found: $out/examples/sheet.png"

echo "2/7 generate camouflage: objects with the texture of their background, turned to another angle"
if [ ! -d "$out/data" ]; then
  unconceal prepare synthetic --kind camouflage --size 64 --train 800 --val 40 --out "$out/data"
fi

echo "3/7 train a tiny RUN"
accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  scripts/train.py configs/run/smoke.yaml --resume "data.path=$out/data" "output_dir=$run"

echo "4/7 evaluate it"
unconceal evaluate --model "$run/segmentation/best" --data "$out/data" --split val --protocol cod \
  --out "$out/results" --overwrite --sheets 4

echo "5/7 load it with transformers"
python - "$out" "$run" <<'PY'
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModel

out = Path(sys.argv[1])
model = AutoModel.from_pretrained(Path(sys.argv[2]) / "segmentation" / "best", trust_remote_code=True)
print(f"{type(model).__name__}, {model.num_parameters():,} parameters")
images = out / "images"
images.mkdir(exist_ok=True)
for row in load_dataset(str(out / "data"), split="val").select(range(8)):
    row["image"].save(images / f"{row['id'].replace('/', '-')}.png")
PY

echo "6/7 segment images that it has not seen"
unconceal segment "$out/images" --model "$run/segmentation/best" --out "$out/segmented" --output mask overlay --overwrite
echo "7/7 explain one of the masks"
first="$(find "$out/images" -name '*.png' | sort | head -n 1)"
unconceal explain "$first" --model "$run/segmentation/best" --out "$out/explained.png" --overwrite
echo "done. images: $out/images; masks and overlays: $out/segmented; scores and best and worst cases: $out/results; one unfolding: $out/explained.png"
echo "in a browser: .venv/bin/python space/app.py --model camouflaged=$run/segmentation/best"
