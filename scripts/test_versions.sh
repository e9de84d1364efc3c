#!/usr/bin/env bash
# Test with other versions of transformers: scripts/test_versions.sh [--bare-only] [VERSION ...]
# The default is the oldest and the newest version that pyproject.toml allows. For each version,
#   1. load saved networks in an environment of torch, transformers, Pillow and NumPy alone;
#   2. run the tests that depend on transformers, unless scripts/test.sh already tests this version.
# The environments stay: .venv-transformers-VERSION and .venv-transformers-VERSION-full.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bare_only=false
versions=()
for argument in "$@"; do
  case "$argument" in
    --bare-only) bare_only=true ;;
    [0-9]*) versions+=("$argument") ;;
    *)
      echo "error: got $argument, expected --bare-only or versions such as 5.17.0" >&2
      exit 2
      ;;
  esac
done

source scripts/setup.sh
export HF_HUB_DISABLE_TELEMETRY=1 HF_HUB_OFFLINE=1
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
version="of the range in pyproject.toml"
trap 'echo "FAILED: transformers $version: $step" >&2' ERR

# Print the version that pip chooses for ==5.17 or >=5.17,<6.
resolve() {
  .venv/bin/python -m pip install --quiet --dry-run --ignore-installed --no-deps --report "$work/report.json" "transformers$1"
  .venv/bin/python -c 'import json, sys; print(json.load(open(sys.argv[1]))["install"][0]["metadata"]["version"])' \
    "$work/report.json"
}

# Install packages into an environment: make_environment FOLDER CONSTRAINTS PACKAGE...
make_environment() {
  local folder="$1" constraints="$2" wanted
  shift 2
  # With the folder, because a moved environment does not work.
  wanted="$(pwd; echo "$@"; cat pyproject.toml "$constraints" | cksum)"
  if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "transformers $version: install into $folder"
  if [ "$(head -n 1 "$folder/.installed" 2>/dev/null)" != "$PWD" ] || ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$folder" .venv-bootstrap
    # Some systems ship Python without its venv module. virtualenv does not need it.
    "$PYTHON" -m venv "$folder" 2>/dev/null || {
      rm -rf "$folder"
      "$PYTHON" -m pip install --quiet --target .venv-bootstrap virtualenv
      PYTHONPATH=.venv-bootstrap "$PYTHON" -m virtualenv --quiet "$folder"
      rm -rf .venv-bootstrap
    }
  fi
  "$folder/bin/python" -m pip install --quiet --constraint "$constraints" "$@"
  echo "$wanted" > "$folder/.installed"
}

pinned="$(sed -n 's/^transformers==//p' constraints.txt)"
if [ ${#versions[@]} -eq 0 ]; then
  step="find the oldest and the newest"
  range="$(sed -n 's/^ *"transformers\(.*\)",$/\1/p' pyproject.toml)"
  oldest="${range#>=}"
  oldest="$(resolve "==${oldest%%,*}")"
  newest="$(resolve "$range")"
  versions=("$oldest" "$newest")
  echo "transformers$range: test with ${versions[*]}"
fi

version="$pinned"
step="save the networks"
echo "transformers $version: $step"
.venv/bin/python tests/save_tiny_models.py "$work/saved" 2>"$work/log" || { cat "$work/log" >&2; false; }
grep '^torch==' constraints.txt > "$work/torch.txt"
# These three depend on each other.
grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > "$work/others.txt"

for version in "${versions[@]}"; do
  folder=".venv-transformers-$version"
  step="install into $folder"
  make_environment "$folder" "$work/torch.txt" torch "transformers==$version" pillow numpy
  step="load the saved networks without the package"
  echo "transformers $version: $step"
  HF_HOME="$work/home-$version" "$folder/bin/python" -I tests/bare_environment.py "$work"/saved/*

  if $bare_only; then
    continue
  fi
  if [ "$version" = "$pinned" ]; then
    echo "transformers $version: scripts/test.sh runs the package's tests with it"
    continue
  fi
  step="install into $folder-full"
  make_environment "$folder-full" "$work/others.txt" "transformers==$version" --editable '.[cutout,dev,metrics,plots]'
  step="run the package's tests"
  echo "transformers $version: $step"
  "$folder-full/bin/python" -m pytest --quiet --numprocesses logical tests/test_api.py \
    tests/test_hub_files.py tests/test_image_processing.py tests/test_loading.py tests/test_modeling_*.py \
    tests/test_mscan.py tests/test_pipeline.py tests/test_recipes.py tests/test_training.py
done
echo "done: transformers ${versions[*]}"
