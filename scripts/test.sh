#!/usr/bin/env bash
# Install on the first run, then check style and run the tests. Arguments go to pytest: scripts/test.sh -k srs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest --numprocesses logical "$@"
