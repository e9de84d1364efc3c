#!/usr/bin/env bash
# Check on a GPU, in less than 9 minutes, what tests on a CPU leave out. Nothing is installed or downloaded.
# scripts/gpu_check.sh [FOLDER]             needs torch, transformers and accelerate; names what else is missing
# scripts/gpu_check.sh --device cpu --quick  tries the script itself
# The tables and numbers go into FOLDER (default: gpu_check). PYTHON names the interpreter.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$here/modeling${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1
for python in ${PYTHON:+"$PYTHON"} python3 "$here/.venv/bin/python"; do
  if "$python" -c "import torch, transformers, accelerate" 2>/dev/null; then
    exec "$python" "$here/scripts/gpu_check.py" "$@"
  fi
done
echo "error: found no Python with torch, transformers and accelerate; set PYTHON=..." >&2
exit 2
