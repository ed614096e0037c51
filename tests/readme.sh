#!/usr/bin/env bash
# Runs the README's examples as they stand there, each region (`<!-- run: NAME -->` … `<!-- end -->`) in a fresh directory.
# A ```sh block is run and must exit 0; one with `curl … -N` watches beside the others until the gateway ends it, also
# with 0. A ```toml block becomes tabcast.toml, and the gateway is started with it; without one, as it is. A ```python
# or ```js block becomes the file that its first line names. The ports 8080 and 9000 of the examples become free ones. The last
# line is "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")/.."

root=$PWD
gateway=${TABCAST_BIN:-$root/target/release/tabcast}
unset "${!TABCAST_@}" # the examples' settings, and no others
python=$root/tests/.venv/bin/python
worker_port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
work=$(mktemp -d)
passed=0
failed=0
processes=()

finish() {
  local process
  for process in "${processes[@]}"; do kill "$process" 2>/dev/null; done
  wait
  rm -rf "$work"
}
trap finish EXIT

pass() {
  passed=$((passed + 1))
}

fail() {
  echo "README.md: $1" >&2
  [ -z "${2:-}" ] || sed 's/^/  | /' "$2" >&2
  failed=$((failed + 1))
}

die() {
  fail "$@"
  echo "$passed passed, $failed failed"
  exit 1
}

# until_true COMMAND…: waits up to ten seconds for it.
until_true() {
  local end=$((SECONDS + 10))
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.05
  done
}

# Writes the blocks of region NAME in order: NUMBER.LANGUAGE.
extract() {
  awk -v region="<!-- run: $1 -->" '
    $0 == region { inside = 1; next }
    inside && $0 == "<!-- end -->" { exit }
    inside && !block && /^```[a-z]+$/ { block = sprintf("%02d.%s", ++count, substr($0, 4)); next }
    inside && block && $0 == "```" { close(block); block = ""; next }
    inside && block { print > block }
  ' "$root/README.md"
}

# Starts the gateway on a free port: what of the examples is not run yet goes there.
start_gateway() {
  "$gateway" --listen 127.0.0.1:0 "$@" >gateway.log 2>&1 &
  gateway_process=$!
  processes+=("$gateway_process")
  until_true grep -q 'ready: http://' gateway.log || die "the gateway does not start" gateway.log
  address=$(grep -oE 'ready: http://[0-9.:]+' gateway.log | cut -d ' ' -f 2)
  find . -name '*.sh' -o -name '*.python' -o -name '*.py' -o -name '*.js' | xargs sed -i "s|127\.0\.0\.1:8080|${address#http://}|g"
  until_true curl -fsS "$address/readyz" || die "the gateway does not start" gateway.log
}

# SIGTERM, and it leaves with 0.
stop_gateway() {
  kill "$gateway_process"
  wait "$gateway_process" && pass || fail "the gateway did not leave well" gateway.log
}

# The number of sessions, whatever the keys.
has_sessions() {
  local key=()
  [ ! -e worker.key ] || key=(-H "Authorization: Bearer $(cat worker.key)")
  curl -fsS "${key[@]}" "$address/api/users" | grep -qE "\"tab_count\":$1[,}]"
}

# Runs one block; a watching one stays until the gateway ends its stream.
run_sh() {
  if grep -q 'curl -fsSN' "$1"; then
    bash -euo pipefail "$1" >watched.txt 2>watched.err &
    watching=$!
    processes+=("$watching")
    until_true has_sessions 1 && pass || fail "the stream does not open" "$1"
  elif bash -euo pipefail "$1" >"$1.out" 2>&1; then
    pass
  else
    fail "exit code $?" "$1"
    cat "$1.out" >&2
  fi
}

# region NAME: in a directory of its own, with a gateway from its ```toml block on, or from the start without one.
region() {
  local block name
  mkdir "$work/$1"
  cd "$work/$1" || exit 1
  extract "$1"
  sed -i -e "s|127\.0\.0\.1:9000|127.0.0.1:$worker_port|g" -e "s|(\"127\.0\.0\.1\", 9000)|(\"127.0.0.1\", $worker_port)|" \
    -e "s|^cargo run --release --|$gateway|" [0-9][0-9].*
  compgen -G '*.sh' >/dev/null || die "region $1 has no example"
  compgen -G '*.toml' >/dev/null || start_gateway
  watching=
  for block in [0-9][0-9].*; do
    case $block in
      *.sh) run_sh "$block" ;;
      *.toml) cp "$block" tabcast.toml && start_gateway --config tabcast.toml ;;
      *.python)
        name=$(sed -nE '1s/^# ([a-z_]+\.py) .*/\1/p' "$block")
        cp "$block" "${name:?a Python example names its file in its first line}"
        ;;
      *.js)
        name=$(sed -nE '1s/^\/\/ ([a-z_]+\.mjs) .*/\1/p' "$block")
        cp "$block" "${name:?an example in JavaScript names its file in its first line}"
        ;;
      *.html) ;; # tests/browser/fallback.test.mjs opens it
    esac
  done
}

# The stream has ended by itself, having shown each of the given frames.
watched() {
  local kind
  [ -n "$watching" ] || die "nothing watched"
  until_true eval "! kill -0 $watching" || kill "$watching"
  wait "$watching" && pass || fail "the stream did not end well" watched.err
  for kind in "$@"; do
    if grep -q "^data: {\"type\":\"$kind\"" watched.txt; then pass; else fail "the stream had no $kind" watched.txt; fi
  done
}

[ -x "$gateway" ] || die "there is no $gateway: cargo build --release"

region development
watched message edit typing file
stop_gateway

region keys
watched message
stop_gateway

region metrics
for file in tabcast.json tabcast-alerts.yaml tabcast.service Dockerfile; do
  [ -s "$file" ] && pass || fail "print gave no $file"
done
stop_gateway

region webhook
python3 worker.py >worker.log 2>&1 &
worker_process=$!
processes+=("$worker_process")
until_true curl -s -o /dev/null "http://127.0.0.1:$worker_port/" || die "worker.py does not start" worker.log
"$python" - "${address#http://}" >webhook.out 2>&1 <<'PYTHON' && pass || fail "worker.py did not answer a tab" webhook.out
import json, sys
from websockets.sync.client import connect

with connect(f"ws://{sys.argv[1]}/ws?user=ann&name=Ann") as tab:
    tab.send(json.dumps({"type": "message", "text": "hi"}))
    while (frame := json.loads(tab.recv(timeout=10))).get("text") != "Ann wrote: hi":
        print(frame)
PYTHON
code=$(curl -s -o forged.out -w '%{http_code}' "http://127.0.0.1:$worker_port/" -H 'X-Tabcast-Timestamp: 1' -H 'X-Tabcast-Signature: sha256=00' -d '{}')
[ "$code" = 401 ] && pass || fail "worker.py answers $code to a forged request"
stop_gateway

# A bot and a client, each with the file that the gateway serves; the bot takes the port of the worker above.
kill "$worker_process"
wait "$worker_process"
region clients
python3 bot.py >bot.log 2>&1 &
bot_process=$!
processes+=("$bot_process")
node --experimental-websocket client.mjs "Is anybody there?" >client.out 2>&1 && pass || fail "client.mjs did not end well" client.out
grep -qx 'Bob wrote: Is anybody there?' client.out && pass || fail "client.mjs has no answer of bot.py" client.out
kill "$bot_process"
wait "$bot_process" && pass || fail "bot.py did not leave well" bot.log
stop_gateway

# The first block starts Redis and both nodes: on free ports, with this binary.
mkdir "$work/nodes"
cd "$work/nodes" || exit 1
extract nodes
free_ports=$(python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))')
read -r redis_port first_port second_port <<<"$free_ports"
sed -i -e "s|\b6379\b|$redis_port|g; s|\b8080\b|$first_port|g; s|\b8081\b|$second_port|g; s|cargo run --release --|exec $gateway|" ./*.sh
sed -e 's|&$||' 01.sh | split -l 1 - command.
for command in command.a?; do
  bash "$command" >"$command.log" 2>&1 &
  processes+=($!)
  [ "$command" != command.aa ] || until_true redis-cli -p "$redis_port" ping || die "Redis does not start" "$command.log"
done
for port in "$first_port" "$second_port"; do
  until_true curl -fsS "http://127.0.0.1:$port/readyz" || die "a node does not start" command.ac.log
done
address=http://127.0.0.1:$first_port
run_sh 02.sh
run_sh 03.sh
watched message
gateway_process=${processes[-2]} && stop_gateway

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
