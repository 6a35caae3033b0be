#!/usr/bin/env bash
# Smoke test of a running server: curl, the OpenAI Python client, Python gRPC through reflection, health Watch.
#   tests/clients/smoke.sh
#   KVARN_HTTP=http://127.0.0.1:9000 KVARN_GRPC=127.0.0.1:9001 tests/clients/smoke.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
http=${KVARN_HTTP:-http://127.0.0.1:8000}
export KVARN_HTTP=$http KVARN_GRPC=${KVARN_GRPC:-127.0.0.1:8001}

fail() { echo "smoke: FAILED: $*" >&2; exit 1; }
command -v curl > /dev/null || { echo "smoke: needs curl (apt-get install curl)" >&2; exit 1; }
step() { printf 'smoke: %-52s' "$*"; }
ok() { echo ok; }
# curl_status EXPECTED ARGS...: the body goes to $body
body=$(mktemp); trap 'rm -f "$body"' EXIT
curl_status() {
  local expected=$1 got; shift
  got=$(curl --silent --show-error --max-time 120 --output "$body" --write-out '%{http_code}' "$@") || fail "curl $*"
  [ "$got" = "$expected" ] || fail "curl $*: status $got instead of $expected: $(head -c 400 "$body")"
}
json='Content-Type: application/json'

step "curl: health, live, ready"
for path in /health /health/live /health/ready; do curl_status 200 "$http$path"; done
ok
step "curl: HEAD and OPTIONS"
curl_status 200 --head "$http/v1/models"
curl_status 204 -X OPTIONS "$http/v1/chat/completions"
ok
step "curl: models, version, metrics"
curl_status 200 "$http/v1/models"; grep -q '"object":"list"' "$body" || fail "models: $(cat "$body")"
curl_status 200 "$http/version"; grep -q '"version"' "$body" || fail "version: $(cat "$body")"
curl_status 200 "$http/metrics"; grep -q '^vllm:num_requests_running' "$body" || fail "metrics: no num_requests_running"
ok
step "curl: chat completion"
curl_status 200 "$http/v1/chat/completions" -H "$json" \
  -d '{"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16, "temperature": 0}'
grep -q '"finish_reason"' "$body" || fail "chat: $(cat "$body")"
ok
step "curl: chat completion as a stream"
curl_status 200 -N "$http/v1/chat/completions" -H "$json" \
  -d '{"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16, "stream": true}'
[ "$(tail -n 2 "$body" | head -n 1)" = "data: [DONE]" ] || fail "the stream does not end with [DONE]: $(tail -c 200 "$body")"
ok
step "curl: errors (404, 405, 415, 400)"
curl_status 404 "$http/nothing/here"
curl_status 405 "$http/v1/chat/completions"
curl_status 415 "$http/v1/chat/completions" -H 'Content-Type: text/plain' -d '{}'
curl_status 400 "$http/v1/chat/completions" -H "$json" -d '{"messages": [{"role": "user", "content": "x"}], "temperature": 3}'
grep -q '"param":"temperature"' "$body" || fail "no param in $(cat "$body")"
ok

python=${KVARN_PYTHON:-}
if [ -z "$python" ]; then
  python=build/venv/bin/python
  if ! "$python" -c 'import openai, grpc, grpc_reflection, grpc_health' 2> /dev/null; then
    echo "smoke: making build/venv (once)"
    python3 -m venv build/venv && build/venv/bin/pip install --quiet -r tests/requirements.txt ||
      fail "cannot make build/venv; set KVARN_PYTHON to a Python with tests/requirements.txt installed"
  fi
fi
"$python" tests/clients/smoke.py
echo "smoke: all passed ($http, $KVARN_GRPC)"
