# Make .venv with the tested versions. test.sh and demo.sh source this file.
# It does nothing if pyproject.toml and constraints.txt are unchanged. Rerun it after an interruption.
# PYTHON names the interpreter (default python3), 3.11 or newer.

PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: $PYTHON is missing or older than Python 3.11; install it, or set PYTHON=..." >&2
  exit 2
fi

# With the folder, because a moved .venv does not work.
wanted="$(pwd; cat pyproject.toml constraints.txt | cksum)"
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing into $PWD/.venv (once; torch is large)"
  rm -rf .venv-bootstrap
  if [ "$(head -n 1 .venv/.installed 2>/dev/null)" != "$PWD" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    # Some systems ship Python without its venv module. virtualenv does not need it.
    "$PYTHON" -m venv .venv 2>/dev/null || {
      rm -rf .venv
      "$PYTHON" -m pip install --quiet --target .venv-bootstrap virtualenv
      PYTHONPATH=.venv-bootstrap "$PYTHON" -m virtualenv --quiet .venv
      rm -rf .venv-bootstrap
    }
  fi
  .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[cutout,dev,encoders,heic,metrics,onnx,plots,space,video]'
  echo "$wanted" > .venv/.installed
fi
