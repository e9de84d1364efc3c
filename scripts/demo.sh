#!/usr/bin/env bash
# The main job end to end on generated data: install, generate, train, evaluate, open, segment, explain.
# Everything is written to the folder that is given (default: demo). Running it again goes on where it stopped.
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
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 # nothing here needs the Hub

# Another recipe is another run: an old one could not be resumed with it.
run="$out/run-$(cksum < configs/run/smoke.yaml | cut -d ' ' -f 1)"

echo "1/6 generate camouflage: objects whose texture is the background's, at another angle"
if [ ! -d "$out/data" ]; then
  python scripts/prepare_data.py synthetic --kind camouflage --size 64 --train 800 --val 40 --out "$out/data"
fi

echo "2/6 train a tiny RUN"
accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  scripts/train.py configs/run/smoke.yaml --resume "data.path='$out/data'" "output_dir='$run'"

echo "3/6 evaluate it"
python scripts/evaluate.py --model "$run/segmentation/best" --data "$out/data" --split val --protocol cod --out "$out/results" --overwrite --pictures 4

echo "4/6 open it as a user of transformers would"
python - "$out" "$run" <<'PY'
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModel

out = Path(sys.argv[1])
model = AutoModel.from_pretrained(Path(sys.argv[2]) / "segmentation" / "best", trust_remote_code=True)
print(f"{type(model).__name__}, {model.num_parameters():,} parameters")
pictures = out / "pictures"
pictures.mkdir(exist_ok=True)
for row in load_dataset(str(out / "data"), split="val").select(range(8)):
    row["image"].save(pictures / f"{row['id'].replace('/', '-')}.png")
PY

echo "5/6 segment pictures that it has not seen"
unconceal segment "$out/pictures" --model "$run/segmentation/best" --out "$out/segmented" --output mask overlay --overwrite
echo "6/6 show how it comes to one of the masks"
first="$(find "$out/pictures" -name '*.png' | sort | head -n 1)"
unconceal explain "$first" --model "$run/segmentation/best" --out "$out/explained.png" --overwrite
echo "done: pictures in $out/pictures, masks and overlays in $out/segmented, numbers, curves, best and worst cases in $out/results, one unfolding in $out/explained.png"
echo "in a browser: .venv/bin/python space/app.py --model camouflaged=$run/segmentation/best"
