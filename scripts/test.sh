#!/usr/bin/env bash
# Check style and run the tests that a change needs. The first run installs into .venv.
# scripts/test.sh --all   also runs what takes minutes: compilers, exports at full size, other versions of transformers
# Other arguments go to pytest: scripts/test.sh -k srs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/codespell modeling scripts space tests configs docs ./*.md
if [ "${1:-}" = --all ]; then
  shift
  .venv/bin/python -m pytest --numprocesses logical -m "not gpu" "$@"
  exec scripts/test_versions.sh
fi
exec .venv/bin/python -m pytest --numprocesses logical "$@"
