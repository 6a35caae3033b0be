#!/usr/bin/env bash
# Runs every GPU test on a machine with a GPU, fails where one fails or is skipped, then runs the
# kernel tests under compute-sanitizer. The last line is a summary in JSON.
#   tests/run_gpu.sh                     the binaries of build/release/bin/tests
#   tests/run_gpu.sh FOLDER              other binaries, carried here from a build machine for instance
#   SANITIZE=0 tests/run_gpu.sh          without compute-sanitizer
# TEST_SECONDS (600) bounds each binary, SANITIZE_SECONDS (120) each run of a sanitizer: one that does
# not end in time counts as unfinished, which the summary says and which fails nothing.
set -uo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(cd "${1:-$here/build/release/bin/tests}" && pwd) || exit 2
test_seconds=${TEST_SECONDS:-600}
sanitize_seconds=${SANITIZE_SECONDS:-120}
export KVARN_DEMO_MODEL=${KVARN_DEMO_MODEL:-$here/assets/demo-model}
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64
log=$(mktemp)
trap 'rm -f "$log"' EXIT

shopt -s nullglob
binaries=("$folder"/*_cuda_*_test)  # tests/<area>/cuda/ and nothing else is built to such names
if [ ${#binaries[@]} = 0 ]; then
  echo "run_gpu.sh: no *_cuda_*_test in $folder; build with nvcc at hand, or name the folder" >&2
  exit 2
fi
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
fi

count() { grep -oE "\[  $1 *\] [0-9]+ test" "$log" | grep -oE '[0-9]+' | head -1 || true; }

passed=0 failed=0 skipped=0 failures=()
for binary in "${binaries[@]}"; do
  name=$(basename "$binary")
  timeout "$test_seconds" "$binary" --gtest_brief=1 >"$log" 2>&1
  code=$?
  ok=$(count PASSED) bad=$(count FAILED) skip=$(count SKIPPED)
  ok=${ok:-0} bad=${bad:-0} skip=${skip:-0}
  [ $code = 0 ] || [ "$bad" != 0 ] || bad=1  # it crashed or ran out of time
  passed=$((passed + ok)) failed=$((failed + bad)) skipped=$((skipped + skip))
  if [ $code != 0 ] || [ "$skip" != 0 ] || [ "$ok" = 0 ]; then
    failures+=("$name")
    echo "FAILED  $name (exit code $code, $skip skipped)"
    tail -n 60 "$log" | sed 's/^/    /'
  else
    echo "passed  $name ($ok tests)"
  fi
done

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
clean=0 errors=0 unfinished=0
if [ "${SANITIZE:-1}" != 0 ] && [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    options=()
    # Tests provoke API errors and check what comes of them; memcheck is to find bad accesses.
    [ $tool != memcheck ] || options=(--report-api-errors no)
    for binary in "$folder"/kernels_cuda_*_test; do
      name=$(basename "$binary")
      [ "$name" != kernels_cuda_device_lost_test ] || continue  # it breaks the device on purpose
      timeout "$sanitize_seconds" "$sanitizer" --tool $tool ${options[@]+"${options[@]}"} --error-exitcode 99 \
        "$binary" --gtest_brief=1 >"$log" 2>&1
      code=$?
      case $code in
        0) clean=$((clean + 1)); echo "clean   $tool $name" ;;
        124) unfinished=$((unfinished + 1)); echo "not finished within ${sanitize_seconds} s: $tool $name" ;;
        *) errors=$((errors + 1)); failures+=("$tool $name")
           echo "FAILED  $tool $name (exit code $code)"
           { grep -vE '^\[' "$log" | head -n 60; grep SUMMARY "$log" || true; } | sed 's/^/    /' ;;
      esac
    done
  done
else
  echo "no compute-sanitizer run"
fi

list=$(printf ',"%s"' ${failures[@]+"${failures[@]}"})
[ ${#failures[@]} = 0 ] && list=,
printf '{"binaries": %d, "passed": %d, "failed": %d, "skipped": %d, "sanitizer": {"clean": %d, "errors": %d, "unfinished": %d}, "failures": [%s]}\n' \
  ${#binaries[@]} $passed $failed $skipped $clean $errors $unfinished "${list#,}"
[ ${#failures[@]} = 0 ]
