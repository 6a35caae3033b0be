#!/usr/bin/env bash
# The CPU figures of docs/performance.md: our model and linear benches and llama.cpp in turn,
# in one run on one machine, written to bench/results/cpu-<processor>.json. Best on an idle machine;
# about ten minutes on two cores.
#   bench/cpu.sh [--cache DIR] [--peer-python PYTHON] [--build DIR] [--threads N] [--rounds N]
# Without --peer-python a virtual environment with bench/requirements.txt is made in the cache, where
# llama.cpp is compiled with native flags (some ten minutes, once).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
recorded="bench/cpu.sh $*"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvarn-bench
build=$root/build/release
peer_python=
rounds=3
# Physical cores that this process may use.
threads=$(lscpu -p=CORE,ONLINE | grep -v '^#' | grep ',Y$' | sort -u | wc -l)
usable=$(nproc)
if ((threads > usable || threads < 1)); then threads=$usable; fi

while (($#)); do
  if (($# < 2)); then
    echo "$1 needs a value; see the head of bench/cpu.sh" >&2
    exit 2
  fi
  case $1 in
    --cache) cache=$2 ;;
    --peer-python) peer_python=$2 ;;
    --build) build=$2 ;;
    --threads) threads=$2 ;;
    --rounds) rounds=$2 ;;
    *)
      echo "unknown flag $1; see the head of bench/cpu.sh" >&2
      exit 2
      ;;
  esac
  shift 2
done
mkdir -p "$cache"

if [[ -z $peer_python ]]; then
  peer_python=$cache/venv/bin/python
  if ! "$peer_python" -c 'import llama_cpp, gguf' 2>/dev/null; then
    python3 -m venv "$cache/venv"
    CMAKE_ARGS="-DGGML_NATIVE=ON" "$peer_python" -m pip install --quiet \
      --no-binary llama-cpp-python -r "$root/bench/requirements.txt"
  fi
fi

if [[ ! -f $build/build.ninja ]]; then
  cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release
fi
cmake --build "$build" --target kvarn_model_bench kvarn_linear_bench
bin=$(dirname "$(find "$build" -name kvarn_model_bench -type f -perm -u+x | head -1)")

# Paths of one machine have no place in a result file.
recorded=$(sed -E 's#(--cache|--peer-python|--build) [^ ]+ ?##g; s# +$##' <<<"$recorded")
exec python3 "$root/bench/cpu_compare.py" --bin "$bin" --peer-python "$peer_python" \
  --cache "$cache" --threads "$threads" --rounds "$rounds" --command "$recorded"
