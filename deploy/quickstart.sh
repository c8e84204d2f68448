#!/usr/bin/env bash
# Runs prism-relay from a clone: finds or starts a broker, builds and starts the relay, sends the six sample events, and
# shows them coming out of their queues. Then it runs until Ctrl-C, which stops everything that it started.
#
# Needs bash 3.2 and the basic tools of a system, but not curl, ps or timeout, which macOS or slim images lack.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: ./deploy/quickstart.sh [--once] [--broker URL] [--install]

Runs prism-relay on this machine, and shows the six sample events coming out of RabbitMQ.
Uses the first RabbitMQ that is available: one that answers on 127.0.0.1:5672, a container (docker or
podman), or a private node from the system's package. Writes only to .quickstart/ and target/.

  --once        stop after the demonstration; exit 0 only if all six events came out
  --broker URL  use this RabbitMQ (amqp://user:password@host:5672/%2f) instead of looking for one
  --install     only install missing system packages: RabbitMQ (its service is not started), a C compiler and make
  -h, --help    this text
EOF
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
state=$root/.quickstart
config=$state/relay.toml
relay=$root/target/release/prism-relay
image=rabbitmq:4-management

# --------------------------------------------------------------------------------------------------------- main

main() {
  local once='' install='' broker_given=''
  while (($#)); do
    case $1 in
      --once) once=yes ;;
      --install) install=yes ;;
      --broker) broker_given=${2:?--broker needs a URL} && shift ;;
      -h | --help) usage && exit 0 ;;
      *) usage >&2 && exit 64 ;;
    esac
    shift
  done

  trap stop_everything EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  (umask 077 && mkdir -p "$state")

  if [[ $install ]]; then
    need_compiler
    rabbitmq_bin >/dev/null || install_packages rabbitmq
    exit 0
  fi

  refuse_a_second_run
  printf '\n%sprism-relay quickstart%s\n\n' "$bold" "$plain"
  need_rust
  find_broker "$broker_given" # a broker that it starts boots during the build
  build_relay
  wait_for_broker
  configure
  start_relay
  send_and_show_events
  if [[ $once ]]; then
    stop_everything
    printf '\nAll six events came out of their queues.\n'
    exit 0
  fi
  print_next_steps
  stay_up
}

# --------------------------------------------------------------------------------------------------- the broker

# Sets broker_url, broker_is (a description to print), and broker_shared if the broker may have other users.
find_broker() {
  broker_url='' broker_is='' broker_shared='' broker_port='' broker_pid='' broker_ui=''
  if [[ $1 ]]; then
    broker_url=$1 broker_is='the RabbitMQ given with --broker' broker_shared=yes
  elif speaks_amqp 5672 && accepts_guest 5672; then
    broker_is='the RabbitMQ that was found on 127.0.0.1:5672' broker_shared=yes broker_port=5672
  else
    speaks_amqp 5672 && note 'The RabbitMQ on 127.0.0.1:5672 refuses guest:guest; to use it: --broker URL'
    start_container || start_private_node
  fi
  if [[ ! $broker_url ]]; then broker_url="amqp://guest:guest@127.0.0.1:$broker_port/%2f"; fi
}

wait_for_broker() {
  if [[ $broker_pid || $container ]]; then
    await 'RabbitMQ boots' 120 "$broker_pid" "$state/broker.log" accepts_guest "$broker_port" ||
      fail 'RabbitMQ did not start.' "$state/broker.log" "If its data is damaged, delete $state/broker and run this again."
  fi
  done_with RabbitMQ "$broker_is"
}

# A broker answers the protocol header with Connection.Start, a method frame: the bytes 1, 0, 0, ... Other servers on
# this port, and a broker that hangs, do not. `read` stops at the first NUL.
speaks_amqp() (
  exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
  printf 'AMQP\0\0\011\001' >&3
  IFS= read -r -t 3 -d '' frame <&3
  [[ $frame == $'\001' ]]
) 2>/dev/null

# Logs in as guest:guest: reads Connection.Start to its end (the locales, then the octet 0xCE) and answers Start-Ok. The
# broker accepts the login with another method frame (Tune), or refuses it by closing the connection.
accepts_guest() (
  LC_ALL=C
  exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
  printf 'AMQP\0\0\011\001' >&3
  until [[ ${chunk-} == *en_US ]]; do IFS= read -r -t 3 -d $'\316' chunk <&3 || exit 1; done
  printf '\1\0\0\0\0\0\044\0\012\0\013\0\0\0\0\5PLAIN\0\0\0\014\0guest\0guest\5en_US\316' >&3
  IFS= read -r -t 6 -d '' frame <&3
  [[ $frame == $'\001' ]]
) 2>/dev/null

start_container() {
  local candidate engine=''
  for candidate in docker podman; do
    # The client may be installed without a running daemon, so ask the daemon.
    if command -v "$candidate" >/dev/null && "$candidate" info >/dev/null 2>&1; then engine=$candidate && break; fi
  done
  if [[ ! $engine ]]; then return 1; fi

  if ! "$engine" image inspect "$image" >/dev/null 2>&1; then
    run_job "$engine pulls $image" "$state/broker.log" "$engine" pull "$image" || {
      note "$engine could not pull $image (see $state/broker.log); trying the system's package."
      return 1
    }
  fi
  broker_port=$(free_port 5673)
  local ui_port && ui_port=$(free_port 15673)
  container=$("$engine" run --detach --rm \
    --publish "127.0.0.1:$broker_port:5672" --publish "127.0.0.1:$ui_port:15672" "$image" 2>"$state/broker.log") || {
    container=''
    note "$engine could not run $image (see $state/broker.log); trying the system's package."
    return 1
  }
  container_engine=$engine
  remember container "$engine" "$container"
  broker_is="a container of $image, on 127.0.0.1:$broker_port" broker_ui="http://127.0.0.1:$ui_port"
}

# A private node, independent of any other RabbitMQ on this machine: own folder, ports, cookie and epmd. `env -i` and
# the paths below keep it from reading /etc/rabbitmq or the caller's RABBITMQ_ variables.
start_private_node() {
  local bin home=$state/broker epmd_port dist_port ui_port epmd
  rabbitmq_bin >/dev/null || install_packages rabbitmq
  bin=$(rabbitmq_bin) || fail 'RabbitMQ is installed, but not where this script looks for it.' '' 'Start it by hand, and run this again with --broker URL.'
  epmd=$(command -v epmd || ls /usr/lib*/erlang/bin/epmd 2>/dev/null) || fail "Erlang's epmd is missing." '' 'Install Erlang (Debian: erlang-base) and run this again.'
  broker_port=$(free_port 5673) ui_port=$(free_port 15673) dist_port=$(free_port 25673) epmd_port=$(free_port 4370)

  (
    umask 077
    mkdir -p "$home/conf.d"
    [[ -s $home/.erlang.cookie ]] || random_hex 20 >"$home/.erlang.cookie"
    chmod 400 "$home/.erlang.cookie"
    echo '[rabbitmq_management,rabbitmq_consistent_hash_exchange].' >"$home/plugins"
    printf '%s\n' 'management.tcp.ip = 127.0.0.1' "management.tcp.port = $ui_port" >"$home/rabbitmq.conf"
  )
  local node_env=(env -i "PATH=$PATH" "HOME=$home" LANG=C.UTF-8
    "ERL_EPMD_PORT=$epmd_port" ERL_EPMD_ADDRESS=127.0.0.1
    RABBITMQ_CONF_ENV_FILE=/dev/null RABBITMQ_NODENAME=quickstart@localhost
    "RABBITMQ_NODE_PORT=$broker_port" RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 "RABBITMQ_DIST_PORT=$dist_port"
    "RABBITMQ_MNESIA_BASE=$home/data" "RABBITMQ_LOG_BASE=$home/log" "RABBITMQ_PID_FILE=$home/node.pid"
    "RABBITMQ_CONFIG_FILE=$home/rabbitmq.conf" "RABBITMQ_CONFIG_FILES=$home/conf.d/*.conf"
    "RABBITMQ_ADVANCED_CONFIG_FILE=$home/advanced.config" "RABBITMQ_ENABLED_PLUGINS_FILE=$home/plugins"
    "RABBITMQ_GENERATED_CONFIG_DIR=$home/generated" "RABBITMQ_SCHEMA_DIR=$home/schema"
    "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}")

  # Start epmd here: if the node started it, it would stay behind as a daemon with an unknown pid.
  start_job "$state/epmd.log" "${node_env[@]}" "$epmd" -port "$epmd_port" -address 127.0.0.1
  epmd_pid=$job
  start_job "$state/broker.log" "${node_env[@]}" "$bin/rabbitmq-server"
  broker_pid=$job
  broker_is="a private node of the system's package, on 127.0.0.1:$broker_port" broker_ui="http://127.0.0.1:$ui_port"
}

# Finds the folder of RabbitMQ's own scripts: Debian's wrappers in /usr/sbin run only as the user rabbitmq.
rabbitmq_bin() {
  local dir
  for dir in /usr/lib/rabbitmq/bin /usr/lib*/rabbitmq/lib/rabbitmq_server-*/sbin /opt/rabbitmq/sbin \
    /opt/homebrew/opt/rabbitmq/sbin /usr/local/opt/rabbitmq/sbin; do
    if [[ -x $dir/rabbitmq-server ]]; then echo "$dir" && return; fi
  done
  return 1
}

# ------------------------------------------------------------------------------------------------- requirements

need_rust() {
  command -v cargo >/dev/null || fail 'cargo is missing: the relay is built from its source.' '' 'Install Rust with rustup, and run this again.'
  need_compiler
}

# Rust needs a C compiler to link. SQLite and jemalloc are built with the compiler and make.
need_compiler() {
  { command -v cc && command -v make; } >/dev/null || install_packages compiler
}

# install_packages rabbitmq|compiler
install_packages() {
  local what=$1 command
  if command -v apt-get >/dev/null; then
    command=$(apt_command "$what")
  elif command -v dnf >/dev/null; then
    command="dnf install -y $(pick "$what" rabbitmq-server 'gcc make')"
  elif command -v apk >/dev/null; then
    command="apk add $(pick "$what" rabbitmq-server 'gcc make musl-dev')"
  elif command -v pacman >/dev/null; then
    command="pacman -S --noconfirm --needed $(pick "$what" rabbitmq 'gcc make')"
  elif command -v brew >/dev/null; then
    command=$(pick "$what" 'brew install rabbitmq' 'xcode-select --install')
  else
    fail "$what is missing, and this script knows no package manager of this system." '' "Install it by hand (or start a container engine), and run this again."
  fi

  local -a as_root=()
  if [[ $EUID != 0 && $command != brew* && $command != xcode* ]]; then
    command -v sudo >/dev/null || fail "Installing the $what package needs root, and there is no sudo." '' "As root: $0 --install"
    note "Installing the $what package with sudo."
    sudo -v || fail 'sudo refused.' '' "As root: $0 --install"
    as_root=(sudo -n)
  fi
  run_to_its_end "Installing $what" "$state/install.log" ${as_root[@]+"${as_root[@]}"} sh -c "$command" ||
    fail "The $what package could not be installed." "$state/install.log" 'Install it by hand, and run this again.'
  done_with Installed "the system's package of $what"
}

pick() { if [[ $1 == rabbitmq ]]; then echo "$2"; else echo "$3"; fi; }

# Debian starts the services that it installs, now and at each boot, and this RabbitMQ would listen on every address. A
# policy-rc.d that exits with 101 keeps both init systems from starting services (RUNLEVEL=1 does not hold back epmd's
# socket unit). An existing policy-rc.d belongs to the administrator and is not changed.
apt_command() {
  if [[ $1 != rabbitmq ]]; then
    echo 'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev make'
    return
  fi
  cat <<'EOF'
set -e
policy=/usr/sbin/policy-rc.d
units=rabbitmq-server.service
command -v epmd >/dev/null || units="$units epmd.socket epmd.service" # unless Erlang was installed before
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends rabbitmq-server
systemctl disable $units || update-rc.d rabbitmq-server disable || true
EOF
}

# ---------------------------------------------------------------------------------------------------- the relay

build_relay() {
  cd "$root"
  # CARGO_TARGET_DIR would put the binary where the commands printed below do not look.
  run_job 'Building prism-relay (minutes at first, then seconds)' "$state/build.log" \
    env -u CARGO_TARGET_DIR -u CARGO_BUILD_TARGET cargo build --release --locked ||
    fail 'The build failed.' "$state/build.log" 'If a crate could not be fetched, check the network and run this again.'
  done_with Built target/release/prism-relay
}

# Rewrites the file at each run, because ports and broker may differ. Keeps the line of the secrets: the generated
# secret of the first run, and secrets that were added by hand.
write_config() {
  local secrets prefix=$1 ladder='' management=''
  # On a private broker, retry queues show what happens to rejected messages: deploy/workers/README.md.
  if [[ ! $broker_shared ]]; then ladder=', retry_delays = ["5s", "10s"]' management="management_url = \"$broker_ui\""; fi
  secrets=$(sed -n '/^secrets = /p' "$config" 2>/dev/null || true)
  if [[ ! $secrets ]]; then secrets="secrets = [\"whsec_$(random_hex 32)\"]"; fi
  scan_queue=$prefix.scan future_me_queue=$prefix.future_me

  (umask 077 && cat >"$config.new") <<EOF
# deploy/quickstart.sh rewrites this file at each run. It keeps only the line of the secrets.
[http]
listen = "127.0.0.1:$http_port"

[signature]
$secrets

[spool]
path = "$state/spool.db"

[broker]
urls = ["$broker_url"]
exchange = "$prefix.events"
$management

[topology]
queues = [
  { name = "$scan_queue", bindings = ["scan.#"]$ladder },
  { name = "$future_me_queue", bindings = ["body_shape_prediction.#"] },
]

[ops]
listen = "127.0.0.1:$ops_port"
EOF
  mv "$config.new" "$config"
}

# On a shared broker, prism.scan and prism.future_me may hold events of another relay, which the demonstration would
# consume. A separate vhost would need an administrator, so if these queues exist, the exchange and the queues get other
# names. Later runs keep these names. prism.unrouted and prism.dead have fixed names: they are declared, but not
# consumed.
configure() {
  local prefix=prism found
  http_port=$(free_port 8080) ops_port=$(free_port 9090)
  write_config "$prefix"
  if [[ ! $broker_shared ]]; then return; fi
  if [[ -s $state/prefix ]]; then
    prefix=$(<"$state/prefix")
  else
    found=$("$relay" --config "$config" check 2>&1 || true)
    if ! grep -q 'queue prism.scan .* does not exist yet' <<<"$found"; then prefix=prism.quickstart; fi
  fi
  echo "$prefix" >"$state/prefix"
  write_config "$prefix"
}

start_relay() {
  start_job "$state/relay.log" "$relay" --config "$config" serve
  relay_pid=$job
  await 'The relay starts' 30 "$relay_pid" "$state/relay.log" is_ready ||
    fail 'The relay did not become ready.' "$state/relay.log" "To find the problem: $relay --config $config check"
  await 'The relay connects' 30 "$relay_pid" "$state/relay.log" is_connected ||
    fail 'The relay cannot reach RabbitMQ.' "$state/relay.log" "To find the problem: $relay --config $config check"
  done_with Relay "http://127.0.0.1:$http_port, connected to RabbitMQ"
}

# shellcheck disable=SC2317 # await calls these three
is_ready() { [[ $(http_get "$ops_port" /readyz) == HTTP/1.1\ 200* ]]; }
# shellcheck disable=SC2317
is_connected() { [[ $(http_get "$ops_port" /api/status) =~ \"broker\".*\"connected\":\ *true ]]; }

# shellcheck disable=SC2317
http_get() (
  exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 0
  printf 'GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n' "$2" >&3
  while IFS= read -r -t 5 line <&3 || [[ $line ]]; do printf '%s\n' "$line"; done
) 2>/dev/null

# ---------------------------------------------------------------------------------------------- the sample events

send_and_show_events() {
  sent_since_ms=$(($(date +%s) * 1000))
  printf '\n%sSending one webhook of each type, signed as Prism signs%s\n' "$bold" "$plain"
  "$relay" --config "$config" send --concurrency 1 || fail 'Not every webhook was accepted.' "$state/relay.log" ''
  show_queue "$scan_queue" scan
  show_queue "$future_me_queue" body_shape_prediction
}

# Consumes until a new event of each of the family's three types has come out. Counting lines would also count
# duplicates (delivery is at least once) and events that an earlier run left in the queue. An id is a UUIDv7: its first
# twelve digits are the time in milliseconds.
show_queue() {
  local queue=$1 family=$2 line='' older=0 phase deadline=$((SECONDS + 30))
  local id_pattern='.*([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}'
  local wanted=" $family.processing.started $family.processing.succeeded $family.processing.failed "
  printf '\n%sComing out of %s%s\n' "$bold" "$queue" "$plain"
  rm -f "$state/tail" && mkfifo -m 600 "$state/tail"
  start_job "$state/tail" "$relay" --config "$config" tail --queue "$queue"
  tail_pid=$job
  exec 4<"$state/tail"
  while [[ $wanted == *[a-z]* ]]; do
    if ((SECONDS >= deadline)) || ! IFS= read -r -t 30 line <&4; then
      fail "These did not come out of $queue within 30 s:$wanted" "$state/relay.log" "$line
To find the problem: $relay --config $config check"
    fi
    if [[ ! $line =~ $id_pattern ]]; then continue; fi
    if ((16#${BASH_REMATCH[1]}${BASH_REMATCH[2]} < sent_since_ms)); then
      older=$((older + 1))
      continue
    fi
    printf '  %s\n' "$line"
    for phase in started succeeded failed; do
      if [[ " $line " == *" $family.processing.$phase "* ]]; then wanted=${wanted/ $family.processing.$phase / }; fi
    done
  done
  sleep 0.3 # tail acknowledges an event after it prints the line
  exec 4<&-
  stop_process "$tail_pid" 5 && tail_pid=''
  if ((older)); then note "  ($older older events were in the queue, left by an earlier run; they are consumed as well)"; fi
}

print_next_steps() {
  local here=''
  if [[ $start_dir != "$root" ]]; then here=$root/; fi
  local url=http://127.0.0.1:$http_port/webhooks/prism cli="${here}target/release/prism-relay --config ${here}.quickstart/relay.toml"
  local worker_url=$broker_url
  if [[ $worker_url != amqp://guest:guest@* ]]; then worker_url='the URL that you gave with --broker'; fi
  cat <<EOF

${bold}It runs.${plain} Ctrl-C stops the relay$([[ $broker_shared ]] || echo ' and its RabbitMQ').

${bold}Give Prism this URL${plain}, made public by your own HTTPS proxy or tunnel:
  $url
Prism signs with the secret of your account: put it into "secrets" in ${here}.quickstart/relay.toml, and start again.

${bold}Send a signed test event${plain}
  body='{"eventType":"scan.processing.succeeded","payload":{"scanId":"test-'"\$RANDOM"'","state":"READY"}}'
  now=\$(date -u +%Y-%m-%dT%H:%M:%SZ)
  secret=\$(sed -n 's/^secrets = \["\([^"]*\)".*/\1/p' ${here}.quickstart/relay.toml)
  curl -i $url -H 'content-type: application/json' -H "prism-timestamp: \$now" -H "prism-signature: \$(printf '%s.%s' "\$now" "\$body" | openssl dgst -sha256 -hmac "\$secret" -r | cut -d' ' -f1)" --data-binary "\$body"

${bold}Subscribe workers${plain} to a queue; they share its events
  $worker_url
  $scan_queue      scan.#
  $future_me_queue body_shape_prediction.#  (Future Me)
Example workers: deploy/workers/README.md
Watch events without taking them from a queue:
  $cli tail 'scan.#'

${bold}Status and logs${plain}
  http://127.0.0.1:$ops_port/api/status (and /readyz, /livez, /metrics)$(
    [[ ! $broker_ui ]] || printf '\n  %s/ RabbitMQ (guest, guest)' "$broker_ui"
  )
  ${here}.quickstart/relay.log

EOF
}

stay_up() {
  trap 'printf "\n"; exit 0' INT
  while alive "$relay_pid"; do sleep 1; done
  fail 'The relay has stopped.' "$state/relay.log" ''
}

# ------------------------------------------------------------------------------------------------------ processes

job='' relay_pid='' tail_pid='' broker_pid='' epmd_pid='' container='' container_engine='' build_pid='' stopping=''
start_dir=$PWD

# start_job LOG COMMAND...: starts the command in its own session and sets job to its pid, which is also its process
# group. In this session, Ctrl-C would stop all processes at once, but the relay must stop before the broker.
start_job() {
  local log=$1 && shift
  if command -v setsid >/dev/null; then
    setsid "$@" </dev/null >"$log" 2>&1 &
  else
    perl -MPOSIX -e 'setsid(); exec @ARGV or die "$ARGV[0]: $!\n"' "$@" </dev/null >"$log" 2>&1 &
  fi
  job=$!
  remember process "$job"
}

# run_job TITLE LOG COMMAND...: runs a command that may be interrupted.
run_job() {
  local title=$1 log=$2 status=0 && shift 2
  start_job "$log" "$@"
  build_pid=$job
  show_progress "$title" "$log" "$job"
  wait "$job" || status=$?
  build_pid=''
  return "$status"
}

# run_to_its_end TITLE LOG COMMAND...: runs a command that must not be interrupted, such as a package manager. It stays
# in this session, to which sudo's ticket is bound. It is a background job, so Ctrl-C does not reach it. The exit waits
# for it.
run_to_its_end() {
  local title=$1 log=$2 status=0 && shift 2
  "$@" </dev/null >"$log" 2>&1 &
  install_pid=$!
  show_progress "$title" "$log" "$install_pid"
  wait "$install_pid" || status=$?
  install_pid=''
  return "$status"
}
install_pid=''

alive() { kill -0 "$1" 2>/dev/null; }

# stop_process PID SECONDS: sends SIGTERM, waits, and then kills the process group.
stop_process() {
  local deadline=$((SECONDS + $2))
  if [[ ! $1 ]]; then return 0; fi
  kill -TERM "$1" 2>/dev/null || true
  while alive "$1" && ((SECONDS < deadline)); do sleep 0.1; done
  if alive "$1"; then kill -KILL -- "-$1" 2>/dev/null || true; fi
  wait "$1" 2>/dev/null || true
}

# The relay stops before the broker, so that it can deliver its pending events.
stop_everything() {
  if [[ $stopping ]]; then return; fi
  stopping=yes
  trap '' HUP INT TERM PIPE
  set +e # if a step fails (the terminal may be gone), still stop the rest
  if [[ $install_pid ]]; then
    note 'Waiting for the package manager to finish ...'
    wait "$install_pid"
  fi
  if [[ $build_pid ]]; then kill -TERM -- "-$build_pid" 2>/dev/null; fi
  if [[ $relay_pid$broker_pid$container ]]; then note 'Stopping ...'; fi
  stop_process "$build_pid" 5
  stop_process "$tail_pid" 5
  stop_process "$relay_pid" 30
  stop_process "$broker_pid" 30
  stop_process "$epmd_pid" 5
  if [[ $container ]]; then "$container_engine" stop "$container" >/dev/null 2>&1; fi
  if [[ $relay_pid$broker_pid$container ]]; then echo 'Stopped.'; fi
  if [[ $owns_state ]]; then rm -f "$state/started" "$state/tail"; fi
}

# A file lists the started processes, so that a run after a kill -9 can stop what the killed run left. The last is
# stopped first, because a node without its epmd starts another one. A pid may belong to another process by then: ours
# have the state folder in their arguments or environment.
owns_state=''
remember() { printf '%s\n' "$*" >>"$state/started"; }

refuse_a_second_run() {
  local kind pid id line lines=()
  if [[ -e $state/started ]]; then
    while read -r line; do lines=("$line" ${lines[@]+"${lines[@]}"}); done <"$state/started"
  fi
  for line in ${lines[@]+"${lines[@]}"}; do
    read -r kind pid id <<<"$line"
    if [[ $kind == script && $(command_of "$pid") == *quickstart.sh* ]]; then
      fail "The quickstart is already running (pid $pid)." '' 'Stop that one with Ctrl-C first.'
    fi
  done
  for line in ${lines[@]+"${lines[@]}"}; do
    read -r kind pid id <<<"$line"
    case $kind in
      process) if [[ $(command_of "$pid") == *"$state"* ]]; then stop_process "$pid" 30; fi ;;
      container) "$pid" stop "$id" >/dev/null 2>&1 || true ;;
    esac
  done
  owns_state=yes
  echo "script $$" >"$state/started"
}

command_of() {
  if [[ -d /proc/self ]]; then cat "/proc/$1/cmdline" "/proc/$1/environ" | tr '\0' ' '; else ps eww -o command= -p "$1"; fi
} 2>/dev/null

# -------------------------------------------------------------------------------------------------------- helpers

free_port() {
  local port=$1
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

random_hex() { od -An -v -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }

# await TITLE SECONDS PID LOG PROBE...: waits until the probe succeeds. Fails at the timeout, or when the process ends.
await() {
  local title=$1 deadline=$((SECONDS + $2)) pid=$3 log=$4 && shift 4
  until "$@"; do
    if ((SECONDS >= deadline)) || { [[ $pid ]] && ! alive "$pid"; }; then return 1; fi
    draw "$title" "$log"
    sleep 0.2
  done
}

show_progress() {
  while alive "$3"; do
    draw "$1" "$2"
    sleep 0.2
  done
}

# Draws a progress line: the title, the seconds, and the last line of the log. Without a terminal, prints a line at the
# start and every 15 s.
ticks=0 titled=''
draw() {
  local last
  last=$(tail -n 1 "$2" 2>/dev/null | tr -d '\r\033' | cut -c 1-60)
  if [[ $titled != "$1" ]]; then titled=$1 ticks=0 title_since=$SECONDS; fi
  if [[ -t 1 ]]; then
    local spinner='|/-+'
    printf '\r\033[K%s %s %s%ds %s%s' "${spinner:ticks % 4:1}" "$1" "$dim" "$((SECONDS - title_since))" "$last" "$plain"
  elif ((ticks % 75 == 0)); then
    printf '. %s %s\n' "$1" "$([[ $ticks == 0 ]] || echo "$last")"
  fi
  ticks=$((ticks + 1))
}

bold='' dim='' red='' green='' plain=''
if [[ -t 1 ]]; then bold=$'\033[1m' dim=$'\033[2m' red=$'\033[31m' green=$'\033[32m' plain=$'\033[0m'; fi

clear_line() { if [[ -t 1 ]]; then printf '\r\033[K'; fi; }
note() { clear_line && printf '%s\n' "$*"; }
done_with() { clear_line && printf '%sok%s %-10s %s\n' "$green" "$plain" "$1" "$2"; }

# fail WHAT LOG ADVICE
fail() {
  clear_line
  printf '\n%s%s%s\n' "$red" "$1" "$plain" >&2
  if [[ $2 && -s $2 ]]; then printf '%s\n' "--- the end of $2" >&2 && tail -n 15 "$2" >&2 && echo '---' >&2; fi
  if [[ $3 ]]; then printf '%s\n' "$3" >&2; fi
  exit 1
}

main "$@"
