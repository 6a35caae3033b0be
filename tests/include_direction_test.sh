#!/usr/bin/env bash
# Includes point one way: server -> engine -> models -> kernels -> kernels/core. Names every line that does not.
set -uo pipefail
cd "${1:-$(dirname "$0")/..}"
failures=0
# forbid FOLDER PATTERN : no file under FOLDER may include a path that matches PATTERN
forbid() {
  local hits
  hits=$(grep -rnE "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]($2)" "$1" --include='*.h' --include='*.cpp' --include='*.cu' --include='*.cuh')
  if [ -n "$hits" ]; then
    printf 'these includes point the wrong way (%s must not include %s):\n%s\n' "$1" "$2" "$hits"
    failures=1
  fi
}
forbid kernels/core 'kernels/[a-z_]+\.|models/|engine/|server/'
forbid kernels 'models/|engine/|server/'
forbid models 'engine/|server/'
forbid engine 'server/'
forbid server 'kernels/(attention|linear|norm|kv_cpu|thread_pool)'
# Heavy or device headers stay where they belong.
forbid server 'cuda|nccl'
forbid engine 'boost/|grpcpp/|cuda|nccl'
forbid models 'boost/|grpcpp/|cuda|nccl|spdlog/'
beast=$(grep -rlE '#include <boost/(beast|asio)' server --include='*.h' --include='*.cpp' | grep -vE '^server/http_' || true)
if [ -n "$beast" ]; then
  printf 'only server/http_* may include Beast or Asio:\n%s\n' "$beast"
  failures=1
fi
spdlog=$(grep -rlE '#include <spdlog/' kernels models engine server | grep -v '^kernels/core/log.cpp$' || true)
if [ -n "$spdlog" ]; then
  printf 'only kernels/core/log.cpp may include spdlog:\n%s\n' "$spdlog"
  failures=1
fi
[ "$failures" -eq 0 ] && echo "all includes point one way"
exit "$failures"
