#!/usr/bin/env bash
# The GPU figures of docs/performance.md: kernels against a plain read and torch's attention, then the engine against its
# own fp16 pages, in one run on one GPU. Writes OUT/<h100|h200|gpu>-<what>.json. About ten minutes.
#   bench/gpu.sh [--bin DIR] [--out DIR] [--commit HASH] [--only WORDS] [--python PYTHON]
# --bin: a build tree, or a folder that holds the programs alone (default build/release). WORDS, comma-separated, of:
# attention-decode,prefill-attention,linear,encode,sampling,engine. --python: one that has torch, for the peers; without
# torch the rows against torch are left out.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
recorded="bench/gpu.sh $*"
bin=$root/build/release
out=$root/bench/results
commit=$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
only=attention-decode,prefill-attention,linear,encode,sampling,engine
python=python3
while (($#)); do
  if (($# < 2)); then
    echo "$1 needs a value; see the head of bench/gpu.sh" >&2
    exit 2
  fi
  case $1 in
    --bin) bin=$2 ;;
    --out) out=$2 ;;
    --commit) commit=$2 ;;
    --only) only=$2 ;;
    --python) python=$2 ;;
    *)
      echo "unknown flag $1; see the head of bench/gpu.sh" >&2
      exit 2
      ;;
  esac
  shift 2
done
mkdir -p "$out"

program() {
  local found
  found=$(find "$bin" -name "$1" -type f -perm -u+x -print -quit 2>/dev/null || true)
  if [[ -z $found ]]; then
    echo "bench/gpu.sh: no $1 under $bin; build it where nvcc is found (KVARN_CUDA=ON)" >&2
    exit 1
  fi
  echo "$found"
}
wanted() { [[ ,$only, == *,$1,* ]]; }

device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)
case $device in
  *H100*) prefix=h100 ;;
  *H200*) prefix=h200 ;;
  *) prefix=gpu ;;
esac
has_torch=no
if "$python" -c 'import torch' 2>/dev/null; then has_torch=yes; else echo "no torch in $python: no rows against it" >&2; fi
peers=$(mktemp -d)
trap 'rm -rf "$peers"' EXIT

if wanted attention-decode; then
  args=()
  if [[ $has_torch == yes ]]; then
    "$python" "$root/bench/cuda/sdpa_peer.py" >"$peers/decode.txt"
    args=(--peer "$peers/decode.txt")
  fi
  it=$(program kvarn_attention_decode_bench)
  "$it" "${args[@]}" --json "$out/$prefix-attention-decode.json" --commit "$commit"
fi
if wanted prefill-attention; then
  args=()
  if [[ $has_torch == yes ]]; then
    "$python" "$root/bench/cuda/attention_prefill_peer.py" "$peers/prefill.txt"
    args=(--peers "$peers/prefill.txt")
  fi
  it=$(program kvarn_prefill_bench)
  "$it" "${args[@]}" --json "$out/$prefix-prefill-attention.json" --commit "$commit"
fi
if wanted linear; then
  it=$(program kvarn_cuda_linear_bench)
  "$it" --json "$out/$prefix-linear.json" --commit "$commit"
fi
if wanted encode; then
  it=$(program kvarn_encode_bench)
  "$it" --json "$out/$prefix-encode.json" --commit "$commit"
fi
if wanted sampling; then
  it=$(program kvarn_sampling_bench)
  "$it" --json "$out/$prefix-sampling.json" --commit "$commit"
fi
if wanted engine; then
  # Paths of one machine have no place in a result file.
  recorded=$(sed -E 's#(--bin|--out|--python) [^ ]+ ?##g; s# +$##' <<<"$recorded")
  it=$(program kvarn)
  python3 "$root/bench/gpu_engine.py" --kvarn "$it" --commit "$commit" --command "$recorded" \
    --out "$out/$prefix-engine.json"
fi
