#!/usr/bin/env bash
# Runs prism-relay from a clone: starts a RabbitMQ, builds and starts the relay, sends the six sample events, and shows
# them pass through. Then it runs until Ctrl-C, which stops everything that it started.
#
# Needs bash 3.2 and the basic tools of a system, but not curl, ps or timeout, which macOS or slim images lack.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: ./deploy/quickstart.sh [--once] [--unsigned] [--broker URL]
       ./deploy/quickstart.sh --install | --clean

Runs prism-relay on this machine, and shows six sample events pass through it to RabbitMQ. RabbitMQ is a
container (docker or podman), or else a private node of the system's package. Listens on 127.0.0.1 only.
Writes to .quickstart/ and target/. Installs missing system packages: RabbitMQ, a C compiler and make.

  --once        stop after the six events; exit 0 only if all of them came through
  --unsigned    accept webhooks without a signature, for a Prism account that has no secret
  --broker URL  use this RabbitMQ (amqp://user:password@host:5672/vhost) in place of starting one. The relay
                declares prism.* exchanges and queues there and publishes the six events: give it a virtual
                host of its own
  --install     only install missing system packages. RabbitMQ's service is not started
  --clean       remove .quickstart/ and the build, and say how to remove the installed packages
  -h, --help    this text
EOF
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
state=$root/.quickstart
config=$state/relay.toml
relay=$state/prism-relay # runs the binary with the addresses of this run
binary=$root/target/debug/prism-relay
image=rabbitmq:4.3.6-management

# --------------------------------------------------------------------------------------------------------- main

main() {
  local once='' install='' clean=''
  unsigned='' broker_given=''
  while (($#)); do
    case $1 in
      --once) once=yes ;;
      --unsigned) unsigned=yes ;;
      --install) install=yes ;;
      --clean) clean=yes ;;
      --broker)
        if [[ ! ${2-} ]]; then wrong_usage '--broker needs a URL'; fi
        broker_given=$2 && shift
        ;;
      -h | --help) usage && exit 0 ;;
      *) wrong_usage "unknown option: $1" ;;
    esac
    shift
  done

  trap stop_everything EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  if [[ $clean ]]; then
    clean_up
    exit 0
  fi
  (umask 077 && mkdir -p "$state")

  if [[ $install ]]; then
    need_compiler
    if [[ ! $missing ]]; then command -v make >/dev/null || missing=compiler; fi # for jemalloc, which tests need
    need_rabbitmq
    if [[ $missing ]]; then manager >/dev/null; fi
    install_missing
    exit 0
  fi

  refuse_a_second_run
  printf '\n%sprism-relay quickstart%s\n\n' "$bold" "$plain"
  look_around
  say_plan
  install_missing
  start_broker # it boots during the build
  build_relay
  wait_for_broker
  write_config
  write_wrapper
  start_relay
  send_and_show_events
  if [[ $once ]]; then
    stop_everything
    printf '\nAll six events came through.\n'
    exit 0
  fi
  print_next_steps
  stay_up
}

wrong_usage() {
  printf '%s\n\n' "$1" >&2
  usage >&2
  exit 64
}

# Finds out what is there and what is missing, before anything is changed. Sets broker_way and missing.
look_around() {
  local candidate
  need_rust
  need_compiler
  broker_way=node
  for candidate in docker podman; do
    # The client may be installed without a running daemon, so ask the daemon.
    if [[ $broker_way == node ]] && command -v "$candidate" >/dev/null && "$candidate" info >/dev/null 2>&1; then
      broker_way=container container_engine=$candidate
    fi
  done
  if [[ $broker_given ]]; then broker_way=given; fi
  if [[ $broker_way == node ]]; then need_rabbitmq; fi
  if [[ $missing ]]; then manager >/dev/null; fi
}

say_plan() {
  echo 'This does the following, without a question:'
  if [[ $missing ]]; then
    printf '  install   %s\n' "$(packages)"
    printf '            (to remove: %s)\n' "$(removal)"
  fi
  printf '  build     the relay into target/: at first about two minutes on two cores and 0.8 GB, later seconds\n'
  case $broker_way in
    container) printf '  start     RabbitMQ in a container (%s, %s; pulled once)\n' "$container_engine" "$image" ;;
    node) printf '  start     a private RabbitMQ node, on 127.0.0.1\n' ;;
    given) printf '  declare   prism.* exchanges and queues on your RabbitMQ, and publish six sample events\n' ;;
  esac
  printf '  start     the relay, on 127.0.0.1\n'
  printf '  write     .quickstart/: configuration, logs, data\n'
  printf 'Ctrl-C stops everything that it started. To remove everything: %s --clean\n\n' "$0"
}

# --------------------------------------------------------------------------------------------------- the broker

# Sets broker_url, and broker_is (a description to print).
start_broker() {
  rm -f "$state/rabbitmqctl"
  case $broker_way in
    given) broker_url=$broker_given broker_is='the RabbitMQ given with --broker' ;;
    container) start_container || start_private_node ;;
    node) start_private_node ;;
  esac
  if [[ $broker_way != given ]]; then broker_url="amqp://guest:guest@127.0.0.1:$broker_port/%2f"; fi
}

wait_for_broker() {
  if [[ $broker_way != given ]]; then
    await 'RabbitMQ boots' 120 "$broker_pid" "$state/broker.log" accepts_guest "$broker_port" ||
      fail 'RabbitMQ did not start.' "$state/broker.log" "If its data is damaged, delete $state/broker and run this again."
  fi
  done_with RabbitMQ "$broker_is"
}

# Logs in as guest:guest: reads Connection.Start to its end (the locales, then the octet 0xCE) and answers Start-Ok. The
# broker accepts the login with another method frame (Tune), or refuses it by closing the connection.
# shellcheck disable=SC2317 # await calls it
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
  if ! "$container_engine" image inspect "$image" >/dev/null 2>&1; then
    run_job "$container_engine pulls $image" "$state/broker.log" "$container_engine" pull "$image" || {
      note "$container_engine could not pull $image (see $state/broker.log); trying the system's package."
      return 1
    }
  fi
  broker_port=$(free_port 5673)
  local ui_port && ui_port=$(free_port 15673)
  container=$("$container_engine" run --detach --rm \
    --publish "127.0.0.1:$broker_port:5672" --publish "127.0.0.1:$ui_port:15672" "$image" 2>"$state/broker.log") || {
    container=''
    note "$container_engine could not run $image (see $state/broker.log); trying the system's package."
    return 1
  }
  remember container "$container_engine" "$container"
  write_script rabbitmqctl "$container_engine" exec "$container" rabbitmqctl
  broker_is="a container of $image, on 127.0.0.1:$broker_port" broker_ui="http://127.0.0.1:$ui_port"
}

# A private node, independent of any other RabbitMQ on this machine: own folder, ports, cookie and epmd. `env -i` and
# the paths below keep it from reading /etc/rabbitmq or the caller's RABBITMQ_ variables.
start_private_node() {
  local bin home=$state/broker epmd_port dist_port ui_port epmd
  # Missing here only if a container could not be started.
  rabbitmq_bin >/dev/null || install_package rabbitmq
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
  write_script rabbitmqctl "${node_env[@]}" "$bin/rabbitmqctl"
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
  local needed found
  needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
  if ! command -v cargo >/dev/null || ! command -v rustc >/dev/null; then
    fail "Rust is missing. The relay is built from its source, which needs Rust $needed or later." '' \
      'Install it from https://rustup.rs, and run this again.'
  fi
  found=$(cd "$root" && rustc --version | cut -d' ' -f2)
  at_least "$found" "$needed" ||
    fail "Rust $found is too old. The relay needs $needed or later." '' 'With rustup: rustup update stable'
}

# at_least 1.93.0 1.89: compares major and minor version.
at_least() {
  local found_minor=${1#*.} needed_minor=${2#*.}
  ((${1%%.*} > ${2%%.*} || (${1%%.*} == ${2%%.*} && ${found_minor%%.*} >= ${needed_minor%%.*})))
}

# Rust needs a C compiler to link, and SQLite is built with it.
need_compiler() {
  command -v cc >/dev/null || missing="$missing compiler"
}

need_rabbitmq() {
  rabbitmq_bin >/dev/null || missing="$missing rabbitmq"
}

# Fails, in the shell of its caller, if there is no package manager.
manager() {
  local candidate
  for candidate in apt-get dnf apk pacman brew; do
    if command -v "$candidate" >/dev/null; then echo "$candidate" && return; fi
  done
  fail "Missing, and this script knows no package manager of this system:$missing" '' \
    'Install it by hand (for RabbitMQ you can also start docker or podman), and run this again.'
}

# The names of the packages of what is missing.
packages() {
  local what manager names=''
  manager=$(manager)
  for what in $missing; do
    case $manager/$what in
      apt-get/compiler) names="$names gcc libc6-dev make" ;;
      apk/compiler) names="$names gcc make musl-dev" ;;
      brew/compiler) names="$names xcode-select" ;;
      */compiler) names="$names gcc make" ;;
      apt-get/rabbitmq | dnf/rabbitmq | apk/rabbitmq) names="$names rabbitmq-server" ;;
      */rabbitmq) names="$names rabbitmq" ;;
    esac
  done
  echo "${names# }"
}

removal() {
  case $(manager) in
    apt-get) echo "sudo apt-get purge --autoremove $(packages)" ;;
    dnf) echo "sudo dnf remove $(packages)" ;;
    apk) echo "sudo apk del $(packages)" ;;
    pacman) echo "sudo pacman -Rs $(packages)" ;;
    brew) echo "brew uninstall $(packages)" ;;
  esac
}

install_missing() {
  local what
  for what in $missing; do install_package "$what"; done
}

# install_package rabbitmq|compiler
install_package() {
  local missing=$1 manager command names
  manager=$(manager)
  names=$(packages)
  case $manager/$1 in
    apt-get/*) command=$(apt_command "$1") ;;
    dnf/*) command="dnf install -y $names" ;;
    apk/*) command="apk add $names" ;;
    pacman/*) command="pacman -S --noconfirm --needed $names" ;;
    brew/compiler) command='xcode-select --install' ;;
    brew/*) command="brew install $names" ;;
  esac

  local -a as_root=()
  if [[ $EUID != 0 && $manager != brew ]]; then
    command -v sudo >/dev/null || fail "Installing $names needs root, and there is no sudo." '' "As root: $0 --install"
    note "Installing $names with sudo."
    sudo -v || fail 'sudo refused.' '' "As root: $0 --install"
    as_root=(sudo -n)
  fi
  run_to_its_end "Installing $names" "$state/install.log" ${as_root[@]+"${as_root[@]}"} sh -c "$command" ||
    fail "Could not install $names." "$state/install.log" 'Install it by hand, and run this again.'
  removal >>"$state/installed"
  done_with Installed "$names"
}

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
  # The profile is that of the tests, so that they build less afterwards; without jemalloc, which takes longer than all
  # other crates together. CARGO_TARGET_DIR would put the binary where the commands printed below do not look. The
  # progress bar in the log has the numbers that are shown.
  run_job 'Building the relay' "$state/build.log" env -u CARGO_TARGET_DIR -u CARGO_BUILD_TARGET \
    CARGO_TERM_PROGRESS_WHEN=always CARGO_TERM_PROGRESS_WIDTH=100 \
    cargo build --locked --no-default-features --bin prism-relay ||
    fail 'The build failed.' "$state/build.log" 'If a crate could not be fetched, check the network and run this again.'
  done_with Built "${binary#"$root"/}"
}

# Written once and never changed again, because people edit it.
write_config() {
  if [[ -e $config ]]; then return; fi
  (umask 077 && cat >"$config.new") <<EOF
# The quickstart wrote this file and never changes it again: edit it as you like, then start the quickstart again.
# http.listen, ops.listen, spool.path and broker.urls come from the quickstart, in the environment.

[signature]
# The secret of your Prism account goes here, in place of this random one.
secrets = ["whsec_$(random_hex 32)"]

[topology]
queues = [
  # A message that a worker rejects comes back after 5 s, then after 10 s, and then goes to prism.dead.
  { name = "prism.scan", bindings = ["scan.#"], retry_delays = ["5s", "10s"] },
  { name = "prism.future_me", bindings = ["body_shape_prediction.#"] },
]
EOF
  mv "$config.new" "$config"
}

# .quickstart/prism-relay: the relay and its commands, with the addresses of this run.
write_wrapper() {
  http_port=$(free_port 8080) ops_port=$(free_port 9090)
  local -a settings=("PRISM_RELAY__HTTP__LISTEN=127.0.0.1:$http_port" "PRISM_RELAY__OPS__LISTEN=127.0.0.1:$ops_port"
    "PRISM_RELAY__SPOOL__PATH=$state/spool.db" "PRISM_RELAY__BROKER__URLS=$broker_url")
  if [[ $broker_ui ]]; then settings+=("PRISM_RELAY__BROKER__MANAGEMENT_URL=$broker_ui"); fi
  if [[ $unsigned ]]; then settings+=(PRISM_RELAY__SIGNATURE__REQUIRED=false); fi
  write_script prism-relay env "${settings[@]}" "$binary" --config "$config"
}

# write_script NAME COMMAND...: a script in .quickstart/ that runs the command with further arguments.
write_script() {
  local name=$1 && shift
  (
    umask 077
    {
      printf '#!/usr/bin/env bash\n# Written by deploy/quickstart.sh at each run.\nexec'
      printf ' %q' "$@"
      # shellcheck disable=SC2016 # the script expands it
      echo ' "$@"'
    } >"$state/$name.new"
    chmod 700 "$state/$name.new"
    mv "$state/$name.new" "$state/$name"
  )
}

start_relay() {
  start_job "$state/relay.log" "$relay" serve
  relay_pid=$job
  await 'The relay starts' 30 "$relay_pid" "$state/relay.log" is_ready ||
    fail 'The relay did not become ready.' "$state/relay.log" "To find the problem: $relay check"
  await 'The relay connects' 30 "$relay_pid" "$state/relay.log" is_connected ||
    fail 'The relay cannot reach RabbitMQ.' "$state/relay.log" "To find the problem: $relay check"
  path=$("$relay" config show | sed -n '/^\[http\]/,/^$/s/^path = "\([^"]*\)".*/\1/p')
  done_with Relay "http://127.0.0.1:$http_port$path, connected to RabbitMQ"
}

# shellcheck disable=SC2317 # await calls these three
is_ready() { [[ $(http_get "$ops_port" /readyz) == HTTP/1.1\ 200* ]]; }
# shellcheck disable=SC2317
is_connected() { [[ $(http_get "$ops_port" /metrics) == *$'\nprism_relay_broker_connected 1'* ]]; } # needs no ops.token

# shellcheck disable=SC2317
http_get() (
  exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 0
  printf 'GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n' "$2" >&3
  while IFS= read -r -t 5 line <&3 || [[ $line ]]; do printf '%s\n' "$line"; done
) 2>/dev/null

# ---------------------------------------------------------------------------------------------- the sample events

# Watches with `tail`, which takes nothing from a queue, until an event of each type has passed.
send_and_show_events() {
  local line='' type types='' wanted deadline=$((SECONDS + 60))
  for type in scan body_shape_prediction; do
    types="$types $type.processing.started $type.processing.succeeded $type.processing.failed"
  done
  wanted="$types "
  rm -f "$state/tail" && mkfifo -m 600 "$state/tail"
  start_job "$state/tail" "$relay" tail
  tail_pid=$job
  exec 4<"$state/tail"
  until [[ $line == waiting\ for\ events* ]]; do
    IFS= read -r -t 30 line <&4 || fail 'Cannot watch the events.' "$state/relay.log" "$line"
  done
  printf '\n%sPosting one webhook of each type, as Prism does%s\n' "$bold" "$plain"
  "$relay" send --concurrency 1 ${unsigned:+--unsigned} || fail 'Not every webhook was accepted.' "$state/relay.log" ''
  printf '\n%sPublished to RabbitMQ%s\n' "$bold" "$plain"
  while [[ $wanted == *[a-z]* ]]; do
    if ((SECONDS >= deadline)) || ! IFS= read -r -t 30 line <&4; then
      fail "These were not published:$wanted" "$state/relay.log" "To find the problem: $relay check"
    fi
    printf '  %s\n' "$line"
    for type in $types; do
      if [[ " $line " == *" $type "* ]]; then wanted=${wanted/ $type / }; fi
    done
  done
  exec 4<&-
  stop_process "$tail_pid" 5 && tail_pid=''
}

print_next_steps() {
  local here='' worker_url=$broker_url
  if [[ $start_dir != "$root" ]]; then here=$root/; fi
  if [[ $broker_way == given ]]; then worker_url='the URL that you gave with --broker'; fi
  printf '\n%sConsole%s   http://127.0.0.1:%s/\n' "$bold" "$plain" "$ops_port"
  cat <<EOF

${bold}Prism${plain}     has to reach http://127.0.0.1:$http_port$path. Give that a public HTTPS address by a tunnel, for example
          cloudflared tunnel --url http://127.0.0.1:$http_port
          and enter the address, with $path behind it, in your Prism account.
EOF
  if [[ $unsigned ]]; then
    printf '          Webhooks are accepted without a signature: any client that knows the address can post.\n'
  else
    printf "          Prism signs with your account's secret: write it to %s.quickstart/relay.toml, and start again.\n" "$here"
    printf '          If your account has no secret: %s --unsigned\n' "$0"
  fi
  printf '\n%sYour own event%s: README.md, "Send your own event"\n' "$bold" "$plain"
  printf '%sWorkers%s: deploy/workers/README.md, with AMQP_URL=%s\n' "$bold" "$plain" "$worker_url"
  printf '%sWatch events%s: %s.quickstart/prism-relay tail\n' "$bold" "$plain" "$here"
  printf '%sEvents that Prism gave up on%s: deploy/reconcile.md, "Try it", with a stand-in for Prism'"'"'s API\n' "$bold" "$plain"
  if [[ -x $state/rabbitmqctl ]]; then
    printf '%sQueue lengths%s: %s.quickstart/rabbitmqctl list_queues name messages\n' "$bold" "$plain" "$here"
  fi
  printf '%sLog%s: %s.quickstart/relay.log\n' "$bold" "$plain" "$here"
  printf '\n%sCtrl-C%s stops everything that this started. %s%s --clean%s then removes everything.\n\n' \
    "$bold" "$plain" "$bold" "$0" "$plain"
}

stay_up() {
  trap 'printf "\n"; exit 0' INT
  while alive "$relay_pid"; do sleep 1; done
  fail 'The relay has stopped.' "$state/relay.log" ''
}

# Removes what the quickstart wrote. Packages stay, because other programs may use them by now.
clean_up() {
  local installed=''
  if [[ -d $state ]]; then
    refuse_a_second_run
    if [[ -s $state/installed ]]; then installed=$(sort -u "$state/installed"); fi
    owns_state=''
    rm -rf "$state"
  fi
  rm -rf "${binary%/*}"
  echo "Removed .quickstart/ and $(cd "$root" && echo "target/${binary#"$root"/target/}" | cut -d/ -f1,2)/."
  if [[ $installed ]]; then printf 'To remove the packages that the quickstart installed:\n%s\n' "$installed"; fi
}

# ------------------------------------------------------------------------------------------------------ processes

job='' relay_pid='' tail_pid='' build_pid='' stopping='' missing='' path=''
broker_way='' broker_url='' broker_is='' broker_port='' broker_ui='' broker_pid='' epmd_pid='' container='' container_engine=''
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

# The last line of a log. Of cargo's progress bar: "145 of 230", and at the end what is waited for.
last_words() {
  local last count
  last=$(tail -c 1000 "$1" 2>/dev/null | tr '\r' '\n' | tr -d '\033' | grep '[^ ]' | tail -n 1 || true)
  count=$(sed -n 's/^ *Building .*\] *\([0-9]*\)\/\([0-9]*\).*/\1 of \2/p' <<<"$last")
  case $last in
    *Building*': prism-relay'*) echo "$count: the relay itself, about 20 s" ;;
    *Building*) echo "$count" ;;
    *) echo "$last" ;;
  esac
}

# Draws a progress line: the title, the seconds, and the last line of the log. Without a terminal, prints a line at the
# start and every 15 s.
ticks=0 titled=''
draw() {
  local last
  last=$(last_words "$2" | cut -c 1-60)
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
