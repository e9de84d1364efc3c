#!/usr/bin/env bash
# The main job end to end on generated data: install, generate, train, evaluate, open, segment.
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
run="$out/run-$(cksum < configs/srs/smoke.yaml | cut -d ' ' -f 1)"

echo "1/5 generate ultrasound-like pictures with lesions"
if [ ! -d "$out/data" ]; then
  python scripts/prepare_data.py synthetic --kind ultrasound --size 96 --train 200 --val 40 --out "$out/data"
fi

echo "2/5 train a tiny SRS, first its reconstruction network, then its segmentation network"
accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  scripts/train.py configs/srs/smoke.yaml --resume "data.path='$out/data'" "output_dir='$run'"

echo "3/5 evaluate it"
python scripts/evaluate.py --model "$run/segmentation/best" --data "$out/data" --split val --out "$out/results" --overwrite

echo "4/5 open it as a user of transformers would"
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

echo "5/5 segment pictures that it has not seen"
unconceal segment "$out/pictures" --model "$run/segmentation/best" --out "$out/segmented" --output mask overlay --overwrite
echo "done: pictures in $out/pictures, masks and overlays in $out/segmented, numbers in $out/results"
