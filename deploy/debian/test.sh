#!/usr/bin/env bash
# Installs, runs, upgrades and purges the package in a temporary Debian system: first in a directory tree without
# systemd, then booted with systemd-nspawn, in its own namespaces and network. Changes neither the cached tree nor this
# system.
set -euo pipefail

usage() {
  cat <<'EOT'
Usage: ./deploy/debian/test.sh [PACKAGE.deb]

  PACKAGE.deb  the package to test [default: built by deploy/debian/build.sh]
  -h, --help   this text

Needs Debian and root. debootstrap creates the test system once, in ~/.cache/prism-relay. Its release is bookworm (12), or
the one in DEBIAN_RELEASE, such as trixie (13).
EOT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
release=${DEBIAN_RELEASE:-bookworm}
cached=${XDG_CACHE_HOME:-$HOME/.cache}/prism-relay/package-$release
passed=0 boot=''

main() {
  local package=${1-}
  if [[ $package == -h || $package == --help ]]; then usage && exit 0; fi
  if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo 'This script boots a Debian system: it needs root, and Debian or a derivative.' >&2
    exit 1
  fi
  if [[ ! $package ]]; then package=$("$here/build.sh" | sed -n '/\.deb$/p'); fi
  package=$(realpath "$package")
  need_debian
  need_package systemd-nspawn systemd-container
  # Only this process and its children see the mounts below. The mounts end with them.
  if [[ ! ${PRISM_TEST_MOUNTS-} ]]; then exec env PRISM_TEST_MOUNTS=ours unshare --mount "${BASH_SOURCE[0]}" "$package"; fi

  work=$(mktemp -d) tree=$work/tree
  trap clean_up EXIT
  mount -t tmpfs tmpfs "$work"
  mkdir "$work/upper" "$work/overlay" "$tree"
  mount -t overlay -o "lowerdir=$cached,upperdir=$work/upper,workdir=$work/overlay" overlay "$tree"
  cp "$package" "$tree/1.deb"
  make_next_version

  mount -t proc proc "$tree/proc"
  in_bare_tree
  umount "$tree/proc"

  boot_tree
  fresh_install
  configured
  survives_a_kill
  restart_under_load
  upgrade_under_load
  without_sockets
  wrong_configuration
  remove_and_purge
  printf '\n%s passed, 0 failed\n' "$passed"
}

# ------------------------------------------------------------------------------------------------------- what is tested

config=/etc/prism-relay/relay.toml
secrets=/etc/prism-relay/credentials/signature-secrets
state=/var/lib/prism-relay

# Without systemd, as when an image is built.
in_bare_tree() {
  enter() { chroot "$tree" "$@"; }
  ok 'installs where systemd does not run' inside dpkg -i /1.deb
  same 'the account' "$(inside getent passwd prism-relay | cut -d: -f6,7)" "$state:/usr/sbin/nologin"
  same 'the configuration is for the group' "$(mode_of $config)" 'root:prism-relay 640'
  same 'the credentials are for root' "$(mode_of "${secrets%/*}")" 'root:root 700'
  same 'the binary' "$(mode_of /usr/bin/prism-relay)" 'root:root 755'
  ends 0 "its version is the package's" "^prism-relay $(version_of prism-relay | cut -d- -f1)\\b" inside prism-relay -V
  ok 'the man page' inside sh -c 'zcat /usr/share/man/man1/prism-relay.1.gz | grep -qi "^\.TH prism-relay 1"'
  ok 'the completions for bash' inside bash -c 'source /usr/share/bash-completion/completions/prism-relay && complete -p prism-relay'
  ok 'the completions for zsh' inside grep -q '^#compdef prism-relay' /usr/share/zsh/vendor-completions/_prism-relay
  ok 'the completions for fish' inside grep -q 'complete -c prism-relay' /usr/share/fish/vendor_completions.d/prism-relay.fish
  ok 'the documentation' inside test -s /usr/share/doc/prism-relay/default.toml -a -s /usr/share/doc/prism-relay/production.example.toml
  ok 'is not enabled' inside sh -c '! ls /etc/systemd/system/*.wants/prism-relay*'
  ok 'systemd finds nothing wrong with the units' inside systemd-analyze verify --man=no /lib/systemd/system/prism-relay.service /lib/systemd/system/prism-relay.socket /lib/systemd/system/prism-relay-ops.socket
  ok 'exposure of at most 1.5' inside systemd-analyze security --no-pager --offline=true --threshold=15 /lib/systemd/system/prism-relay.service
  ends 64 'the configuration needs a secret' signature.secrets_file inside prism-relay --config $config check --offline
  inside sh -c "umask 077; echo whsec_$(random_hex) >$secrets"
  ok 'and is right with it' inside prism-relay --config $config check --offline

  inside sh -c "echo '# changed by hand' >>$config"
  ok 'is upgraded' inside dpkg -i /2.deb
  ok 'and keeps the changed configuration' inside grep -q '^# changed by hand' $config
  ok 'is removed' inside dpkg --remove prism-relay
  ok 'and leaves its configuration' inside test -s $config -a -s $secrets
  ok 'is purged' inside dpkg --purge prism-relay
  ok 'and leaves nothing' inside sh -c "! ls -d /etc/prism-relay $state"
}

fresh_install() {
  ok 'installs' inside dpkg -i /1.deb
  same 'and starts nothing' "$(property ActiveState) $(property ActiveState prism-relay.socket)" 'inactive inactive'
  same 'and nothing fails' "$(inside systemctl --failed --no-legend)" ''
  ends 1 'does not start without a secret' 'failed' inside systemctl start prism-relay
  eventually 'the journal says why' journal_has 'signature.secrets_file.*holds no secret'
  same 'the exit code' "$(property ExecMainStatus)" 64
  sleep 3 # more than RestartSec
  same 'exit code 64 is not restarted' "$(property ActiveState) $(property NRestarts)" 'failed 0'
}

configured() {
  inside sh -c "umask 077; echo whsec_$(random_hex) >$secrets"
  ok 'starts once it has a secret' inside systemctl enable --now prism-relay
  same 'is active only when it is ready' "$(readiness)" 200
  same 'and reported it itself' "$(property Type) $(property ActiveState) $(property SubState)" 'notify active running'
  same 'runs as its own account' "$(inside stat -c %U "/proc/$(property MainPID)")" prism-relay
  same 'the sockets are systemd'\''s' "$(property ActiveState prism-relay.socket) $(property ActiveState prism-relay-ops.socket)" 'active active'
  same 'it starts at boot' "$(inside systemctl is-enabled prism-relay.service prism-relay.socket prism-relay-ops.socket | sort -u)" enabled
  same 'the spool is its own' "$(mode_of $state) $(mode_of $state/spool.db)" 'prism-relay:prism-relay 700 prism-relay:prism-relay 600'
  ok 'accepts webhooks' send --count 20
  ok 'reloads' inside systemctl reload prism-relay
  same 'and goes on' "$(readiness) $(property NRestarts)" '200 0'
  eventually 'the watchdog is fed' watchdog_fed
  ok 'the check before the start is in the journal' journal_has 'will be created'
  ok 'and finds nothing wrong' journal_has_not WRONG
}

survives_a_kill() {
  local before
  before=$(accepted)
  inside sh -c "kill -KILL $(property MainPID)"
  ok 'accepts webhooks while it is restarted after a kill' send --count 20
  same 'and was restarted' "$(property ActiveState) $(property NRestarts)" 'active 1'
  same 'and lost nothing' "$(($(accepted) - before))" 20
}

restart_under_load() {
  local before sockets
  before=$(accepted) sockets=$(socket_times)
  start_load
  for _ in 1 2 3; do
    sleep 4
    ok 'restarts under load' inside systemctl restart prism-relay
  done
  ok 'no webhook of 4000 was refused or answered 5xx' load_went_well
  same 'and none was lost' "$(($(accepted) - before))" 4000
  same 'the sockets stayed open' "$(socket_times)" "$sockets"
}

upgrade_under_load() {
  local before sockets pid
  before=$(accepted) sockets=$(socket_times) pid=$(property MainPID)
  start_load
  sleep 3
  ok 'is upgraded under load' inside dpkg -i /2.deb
  same 'the version' "$(version_of prism-relay)" "$(cat "$work/next_version")"
  ok 'a new process runs' test "$(property MainPID)" != "$pid" -a "$(property ActiveState)" = active
  ok 'no webhook of 4000 was refused or answered 5xx' load_went_well
  same 'and none was lost' "$(($(accepted) - before))" 4000
  same 'the sockets stayed open' "$(socket_times)" "$sockets"
  ok 'the spool is whole' inside prism-relay --config $config spool verify
}

# Another setup: no socket units, a broker with a host name, and a secret that is reloaded without a restart.
without_sockets() {
  local free=/etc/prism-relay/secrets
  inside sh -c "echo 127.0.0.1 broker.internal >>/etc/hosts"
  inside sh -c "echo 'PRISM_RELAY__BROKER__URLS=amqp://broker.internal:5672' >/environment"
  inside sh -c "umask 027; echo whsec_$(random_hex) >$free; chgrp prism-relay $free; cp -p $config /kept; sed -i s,$secrets,$free, $config"
  inside sh -c "mkdir -p /run/systemd/system/prism-relay.service.d; printf '[Service]\\nEnvironmentFile=/environment\\n' >/run/systemd/system/prism-relay.service.d/test.conf"
  ok 'the sockets are masked' inside systemctl mask --now prism-relay.socket prism-relay-ops.socket
  ok 'restarts without them' inside systemctl restart prism-relay
  same 'and listens by itself' "$(readiness) $(property ActiveState prism-relay.socket)" '200 inactive'
  ok 'and accepts webhooks' send --count 20
  eventually 'looks up the name of the broker' journal_has 'cannot reach broker.internal:5672: Connection refused'
  inside sh -c "echo whsec_$(random_hex) >$free"
  ok 'reloads a secret' inside systemctl reload prism-relay
  eventually 'and believes it' send --count 1
  same 'without a restart' "$(property NRestarts)" 0
  inside sh -c "rm -r /run/systemd/system/prism-relay.service.d; cp -p /kept $config"
  inside systemctl unmask --quiet prism-relay.socket prism-relay-ops.socket
  ok 'and takes the sockets again' inside systemctl restart prism-relay
  same 'which are open' "$(readiness) $(property ActiveState prism-relay.socket)" '200 active'

  inside sh -c "mkdir -p /etc/systemd/system/prism-relay.socket.d && printf '[Socket]\\nListenStream=\\nListenStream=127.0.0.1:8081\\n' >/etc/systemd/system/prism-relay.socket.d/test.conf"
  inside systemctl daemon-reload
  # Stop and start, because restarting both at once failed occasionally.
  ok 'takes a socket elsewhere' inside sh -c "systemctl stop 'prism-relay*' && systemctl start prism-relay"
  ok 'and accepts webhooks there' send --url http://127.0.0.1:8081/webhooks/prism --count 20
  inside sh -c 'rm -r /etc/systemd/system/prism-relay.socket.d && systemctl daemon-reload && systemctl stop "prism-relay*" && systemctl start prism-relay'
}

# Connections must not make systemd retry forever a relay that cannot start.
wrong_configuration() {
  inside sh -c "cp -p $config /kept && echo nonsense = 1 >>$config"
  ends 1 'a wrong configuration does not start' failed inside systemctl restart prism-relay
  same 'with exit code 64' "$(property ExecMainStatus) $(property ActiveState)" '64 failed'
  (inside timeout 5 bash -c 'exec 3<>/dev/tcp/127.0.0.1/8080 && cat <&3' || true) >/dev/null 2>&1
  eventually 'connections wake it up a few times only' socket_failed
  inside cp -p /kept $config
  sleep 10 # StartLimitIntervalSec
  ok 'starts again when it is fixed' inside systemctl start prism-relay
  ok 'and accepts webhooks' send --count 20
}

remove_and_purge() {
  local before
  before=$(accepted)
  ok 'is removed' inside dpkg --remove prism-relay
  ends 1 'no process listens any more' '' inside bash -c 'exec 3<>/dev/tcp/127.0.0.1/8080'
  ok 'the configuration and the spool are kept' inside test -s $config -a -s $secrets -a -s $state/spool.db
  ends 0 'is purged with events in the spool, and says where they are' "$state is kept" inside dpkg --purge prism-relay
  ok 'where they are' inside test -s $state/spool.db
  ok 'the configuration is gone' inside sh -c '! ls -d /etc/prism-relay'
  ok 'it is not enabled any more' inside sh -c '! ls /etc/systemd/system/*.wants/prism-relay*'

  ok 'is installed once more' inside dpkg -i /2.deb
  inside sh -c "umask 077; echo whsec_$(random_hex) >$secrets"
  ok 'and started' inside systemctl start prism-relay
  same 'with the old events' "$(accepted)" "$before"
  inside sh -c "systemctl stop 'prism-relay*' 2>&1 && mkdir $state/data && mv $state/spool.db $state/data/prism.db && rm $state/spool.db*" >/dev/null
  purged_with 'events in another spool' "$state/data/prism.db"
  purged_with 'a damaged spool' "$state/spool.db.damaged-20261125T120000Z"

  ok 'is installed once more' inside dpkg -i /2.deb
  inside sh -c "umask 077; echo whsec_$(random_hex) >$secrets"
  ok 'starts with an empty spool' inside systemctl start prism-relay
  ok 'is purged with an empty spool' inside dpkg --purge prism-relay
  ok 'and leaves nothing' inside sh -c "! ls -d /etc/prism-relay $state"
  same 'and nothing has failed' "$(inside systemctl --failed --no-legend)" ''
}

# purged_with WHAT FILE: a purge keeps FILE, even if the spool next to it is empty.
purged_with() {
  ok 'is installed once more' inside dpkg -i /2.deb
  inside sh -c "umask 077; echo whsec_$(random_hex) >$secrets; [ -e $2 ] || echo x >$2"
  ok 'starts with an empty spool' inside systemctl start prism-relay
  ends 0 "is purged with $1, and keeps it" "$state is kept" inside dpkg --purge prism-relay
  ok 'where it was' inside test -s "$2"
  inside sh -c "rm -r $state/*"
}

# ------------------------------------------------------------------------------------------------------------- probes

inside() { enter env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive "$@"; }

property() { inside systemctl show --value --property "$1" "${2-prism-relay.service}"; }
mode_of() { inside stat -c '%U:%G %a' "$1"; }
# shellcheck disable=SC2016 # dpkg-query expands it
version_of() { inside dpkg-query --show --showformat '${Version}' "$1"; }
accepted() { inside prism-relay --config $config spool stats | awk '$1 == "accepted" { print $2 }'; }
send() { inside prism-relay --config $config send --no-retry "$@"; }
socket_times() { property ActiveEnterTimestampMonotonic prism-relay.socket && property ActiveEnterTimestampMonotonic prism-relay-ops.socket; }
journal_has() { inside journalctl --no-pager --quiet --unit prism-relay | grep -q "$1"; }
journal_has_not() { ! journal_has "$1"; }
socket_failed() { [[ $(property ActiveState prism-relay.socket) == failed ]]; }
watchdog_fed() { [[ $(property WatchdogTimestampMonotonic) -gt $(property ActiveEnterTimestampMonotonic) ]]; }
random_hex() { od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n'; }

readiness() {
  # shellcheck disable=SC2016 # the inner bash expands it
  inside timeout 10 bash -c 'exec 3<>/dev/tcp/127.0.0.1/9090 && printf "GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n" >&3 && read -r _ status _ <&3 && echo "$status"'
}

# Sends 4000 webhooks in 20 s. With Prism's retries, because a client may use a kept-alive connection just when the
# relay closes it. No server can prevent that, and no event may be lost by it.
start_load() {
  inside prism-relay --config $config send --rate 200 --count 4000 >"$work/load" 2>&1 &
  load=$!
}

load_went_well() { wait "$load" && ! grep -Eiq 'refused|answered [345]' "$work/load"; }

# ok WHAT COMMAND...
ok() {
  local what=$1 && shift
  if "$@" >"$work/out" 2>&1; then pass "$what"; else fail "$what" "$* ended with $?"; fi
}

# ends CODE WHAT PATTERN COMMAND...
ends() {
  local code=$1 what=$2 pattern=$3 status=0 && shift 3
  "$@" >"$work/out" 2>&1 || status=$?
  if [[ $status == "$code" ]] && grep -q -- "$pattern" "$work/out"; then pass "$what"; else fail "$what" "$* ended with $status"; fi
}

# same WHAT FOUND EXPECTED
same() {
  : >"$work/out"
  if [[ $2 == "$3" ]]; then pass "$1"; else fail "$1" "found '$2', expected '$3'"; fi
}

# eventually WHAT PROBE...
eventually() {
  local what=$1 deadline=$((SECONDS + 40)) && shift
  until "$@" >"$work/out" 2>&1; do
    if ((SECONDS >= deadline)); then fail "$what" 'not within 40 s'; fi
    sleep 0.2
  done
  pass "$what"
}

pass() { printf 'ok    %s\n' "$1" && passed=$((passed + 1)); }

fail() {
  printf 'WRONG %s: %s\n' "$1" "$2"
  sed 's/^/      /' "$work/out"
  if [[ -s $work/load ]]; then sed 's/^/load  /' "$work/load"; fi
  if [[ $boot ]]; then inside journalctl --no-pager --quiet --lines 40 || true; fi
  exit 1
} >&2

# ------------------------------------------------------------------------------------------------ the temporary Debian

need_debian() {
  local mirror
  # The tree gets its final name only when it is complete.
  if [[ -d $cached ]]; then return; fi
  need_package debootstrap debootstrap
  echo "Creating a Debian $release system in $cached (once, about a minute) ..."
  rm -rf "$cached.partial" && mkdir -p "$cached.partial"
  # Use the mirror of this system's packages, or debootstrap's default if apt names none.
  # shellcheck disable=SC2016 # apt expands it
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' 'Origin: Debian' 2>/dev/null | grep -v security | head -n 1 || true)
  debootstrap --variant=minbase --include=systemd "$release" "$cached.partial" ${mirror:+"$mirror"} >"$cached.log" 2>&1 || {
    tail -n 15 "$cached.log" >&2
    echo "debootstrap failed; the whole log is in $cached.log" >&2
    exit 1
  }
  mv "$cached.partial" "$cached"
}

# need_package COMMAND PACKAGE: installs the package if the command is missing. The two packages used here start no
# service.
need_package() {
  if command -v "$1" >/dev/null; then return; fi
  echo "Installing $2 ..."
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2"; } >/dev/null
}

# Makes a copy of the package with a higher version.
make_next_version() {
  dpkg-deb -R "$tree/1.deb" "$work/next"
  sed -i 's/^Version: .*/&+next/' "$work/next/DEBIAN/control"
  sed -n 's/^Version: //p' "$work/next/DEBIAN/control" >"$work/next_version"
  dpkg-deb --root-owner-group -Znone -b "$work/next" "$tree/2.deb" >/dev/null
  rm -r "$work/next"
}

boot_tree() {
  local flags=() pid
  # Without systemd on this system, do not register the machine.
  if [[ ! -d /run/systemd/system ]]; then flags=(--register=no --keep-unit); fi
  systemd-nspawn --quiet --boot --private-network --console=read-only --machine="prism-relay-test-$$" --directory="$tree" "${flags[@]}" \
    </dev/null >"$work/console" 2>&1 &
  boot=$!
  enter() {
    pid=$(pid_one) && nsenter --target "$pid" --mount --uts --ipc --net --pid --cgroup "$@"
  }
  eventually 'Debian boots' is_up
}

pid_one() {
  local pid
  for pid in $(<"/proc/$boot/task/$boot/children"); do
    if [[ $(cat "/proc/$pid/comm") == systemd ]]; then echo "$pid" && return; fi
  done
  return 1
}

is_up() { [[ $(inside systemctl is-system-running 2>/dev/null) == running ]]; }

# SIGTERM makes nspawn shut the system down properly.
clean_up() {
  set +e
  if [[ $boot ]] && kill -TERM "$boot" 2>/dev/null; then
    for _ in {1..100}; do
      if ! kill -0 "$boot" 2>/dev/null; then break; fi
      sleep 0.1
    done
    if kill -0 "$boot" 2>/dev/null; then kill -KILL "$(pid_one)" "$boot"; fi
  fi
  wait
  # Delete the control groups that nspawn leaves on a system without systemd. Groups with processes stay.
  find /sys/fs/cgroup{,/unified,/systemd}"$(sed -n 's/^0:://p' /proc/self/cgroup)"/{payload,supervisor} -depth -type d -delete 2>/dev/null
  umount --lazy "$work" && rmdir "$work"
}

main "$@"
