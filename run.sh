#!/usr/bin/env bash
# Installs what is missing, builds kvarn and serves the demo model on 127.0.0.1:8000 (HTTP) and :8001 (gRPC).
#   ./run.sh                                  serve the demo model
#   ./run.sh --model DIR --port 9000          serve another model: all arguments go to `kvarn serve`
#   ./run.sh chat|bench|eval|inspect ...      run another command of kvarn
set -euo pipefail
cd "$(dirname "$0")"
. tools/dev/setup.sh

# shellcheck disable=SC2086
install_packages $build_packages
build_preset release kvarn

case "${1:-}" in
  serve | chat | bench | eval | inspect | pull | version) command=$1; shift ;;
  *) command=serve ;;
esac
has_model() { for a in "$@"; do case $a in --model | --model=* | --shape | --shape=* | --config | --config=* | --url | --url=* | --help | -h) return 0 ;; esac; done; return 1; }
if [ -z "${KVARN_MODEL:-}" ] && [ "$command" != version ] && [ "$command" != pull ] && ! has_model "$@"; then
  set -- --model assets/demo-model "$@"
fi
exec build/release/bin/kvarn "$command" "$@"
