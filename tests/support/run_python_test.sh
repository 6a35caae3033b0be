#!/usr/bin/env bash
# run_python_test.sh PYTHON SCRIPT [ARGS]: runs a test that needs the Python test environment. Exits
# with 77, which ctest reports as skipped, where the environment or one of its packages is missing.
set -euo pipefail
python=$1
shift
if [ ! -x "$python" ]; then
  echo "SKIPPED: no Python test environment at $python;" \
       "make it with: python3 -m venv build/venv && build/venv/bin/pip install -r tests/requirements.txt"
  exit 77
fi
exec "$python" "$@"
