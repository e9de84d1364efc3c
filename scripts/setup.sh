# Sourced by test.sh and demo.sh: makes .venv with the tested versions. Safe to run again at any time, also after an
# interruption; does nothing when pyproject.toml and constraints.txt are as they were.
# PYTHON names the interpreter to use (default python3); 3.11 or newer.

PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: $PYTHON is missing or older than Python 3.11; install it, or name another as PYTHON=..." >&2
  exit 2
fi

# With the folder: a moved .venv is of no use.
wanted="$(pwd; cat pyproject.toml constraints.txt | cksum)"
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing into $PWD/.venv (once; torch is large)"
  rm -rf .venv-bootstrap
  if [ "$(head -n 1 .venv/.installed 2>/dev/null)" != "$PWD" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    # Some systems ship Python without its venv module; virtualenv needs none.
    "$PYTHON" -m venv .venv 2>/dev/null || {
      rm -rf .venv
      "$PYTHON" -m pip install --quiet --target .venv-bootstrap virtualenv
      PYTHONPATH=.venv-bootstrap "$PYTHON" -m virtualenv --quiet .venv
      rm -rf .venv-bootstrap
    }
  fi
  .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[cutout,dev,metrics,onnx,plots,space]'
  echo "$wanted" > .venv/.installed
fi
