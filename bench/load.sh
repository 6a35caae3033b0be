#!/usr/bin/env bash
# Load test: 2,000 streaming requests, 256 at once, a fifth cancelled at random moments. Starts its own server.
#   bench/load.sh                                    the demo model, build/release
#   bench/load.sh --model DIR --requests 500 --out FILE
# Checks every answer against a reference fetched first, and afterwards gauges, leaked pages and resident memory.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 bench/load.py "$@"
