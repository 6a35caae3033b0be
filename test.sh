#!/usr/bin/env bash
# Installs what is missing, builds everything and runs every CPU test; ends with ctest's summary.
#   ./test.sh                        the release build, all tests
#   ./test.sh --preset cpu-debug     under ASan and UBSan (or cpu-tsan: TSan)
#   ./test.sh -L oracle              further arguments go to ctest
set -euo pipefail
cd "$(dirname "$0")"
. tools/dev/setup.sh

preset=release
if [ "${1:-}" = --preset ]; then preset=${2:?--preset needs a name}; shift 2; fi
# shellcheck disable=SC2086
install_packages $build_packages $test_packages
make_venv build/venv tests/requirements.txt ||
  say "no Python test environment (is PyPI reachable?): tests that need it will be reported as skipped"
build_preset "$preset" all

# GCC 13 places 64-byte vectors in fake stack frames that are aligned to 32 only (GCC bug 110027).
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=1 detect_stack_use_after_return=0}"
export UBSAN_OPTIONS="${UBSAN_OPTIONS:-print_stacktrace=1}"
export TSAN_OPTIONS="${TSAN_OPTIONS:-halt_on_error=1 second_deadlock_stack=1 suppressions=$PWD/tests/support/tsan.supp}"
ctest --preset "$preset" --label-exclude nightly --parallel "$(nproc)" "$@"
