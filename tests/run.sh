#!/usr/bin/env bash
# Runs the whole test suite: installs what it needs, then runs `cargo test`. The suite starts private RabbitMQ nodes with
# their own folders and ports; it starts and changes no service of the system.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: ./tests/run.sh [--rabbitmq-4 | --rabbitmq-newest] [ARGUMENTS FOR CARGO TEST]

  --rabbitmq-4       run the suite against Debian 13's RabbitMQ 4.0 in place of the system's, in a tree that debootstrap
                     makes once in ~/.cache/prism-relay/trixie (needs Debian and root; takes a few minutes)
  --rabbitmq-newest  the same with the RabbitMQ of Debian unstable, in ~/.cache/prism-relay/sid; delete the folder to
                     get a newer one
  -h, --help         this text

For example: ./tests/run.sh --test suite restart
EOF
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."

main() {
  case ${1-} in
    -h | --help) usage && exit 0 ;;
    --rabbitmq-4)
      shift
      need_tree trixie
      ;;
    --rabbitmq-newest)
      shift
      need_tree sid
      ;;
    *) need_rabbitmq ;;
  esac
  { command -v cc && command -v make; } >/dev/null || ./deploy/quickstart.sh --install
  need_package faketime /usr/lib/*/faketime/libfaketime.so.1 /usr/lib/faketime/libfaketime.so.1
  need_package chromium /usr/bin/chromium
  need_package chromium-driver /usr/bin/chromedriver
  need_package curl /usr/bin/curl
  need_package openssl /usr/bin/openssl
  need_package python3-pika /usr/lib/python3/dist-packages/pika
  need_node
  need_python_tools
  need_promtool
  need_nginx
  # A test mostly waits, for RabbitMQ's statistics and for retries. So more tests than cores run at a time.
  if [[ ! ${RUST_TEST_THREADS-} && $(nproc) -lt 4 ]]; then export RUST_TEST_THREADS=4; fi
  # Some tests mount small file systems: as root, or as root of a user namespace where the system allows that.
  if [[ $EUID != 0 ]] && unshare --user --map-root-user --mount true 2>/dev/null; then
    exec unshare --user --map-root-user --mount cargo test --locked --all-features "$@"
  fi
  exec cargo test --locked --all-features "$@"
}

# Installs RabbitMQ with the quickstart, which does not start its service.
need_rabbitmq() {
  if [[ ${PRISM_TEST_RABBITMQ_BIN-}${PRISM_TEST_RABBITMQ_ROOT-} || -x /usr/lib/rabbitmq/bin/rabbitmq-server ]]; then return; fi
  if ! command -v apt-get >/dev/null; then
    echo 'The suite needs RabbitMQ in /usr/lib/rabbitmq/bin, where the Debian package rabbitmq-server installs it.' >&2
    echo 'Elsewhere set PRISM_TEST_RABBITMQ_BIN to the folder of rabbitmq-server, or run this in a Debian container.' >&2
    exit 1
  fi
  ./deploy/quickstart.sh --install
}

# Installs a package, unless one of these files is there. faketime makes the wall clock jump; Chromium shows the console.
need_package() {
  local package=$1 file
  shift
  for file; do
    if [[ -e $file ]]; then return; fi
  done
  if ! command -v apt-get >/dev/null; then
    echo "The suite needs $package (Debian's name for the package)." >&2
    exit 1
  fi
  echo "Installing $package ..."
  as_root apt-get update -qq >/dev/null
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null
}

# Installs Node.js, the library of the example worker, and the validators of the schemas and of the AsyncAPI document.
need_node() {
  command -v node >/dev/null || need_package nodejs /usr/bin/node
  need_modules deploy/workers/node node
  export PRISM_TEST_NODE_MODULES=$modules
  need_modules tests/contract contract
  export PRISM_TEST_CONTRACT_MODULES=$modules
}

# Fetches what the package.json of a folder names, to a folder of the cache. Sets $modules to its node_modules.
need_modules() {
  local source=$1/package.json folder=${XDG_CACHE_HOME:-$HOME/.cache}/prism-relay/$2
  modules=$folder/node_modules
  if cmp -s "$source" "$folder/package.json"; then return; fi
  command -v npm >/dev/null || need_package npm /usr/bin/npm
  echo "Fetching the npm packages of $source ..."
  rm -rf "$folder.partial" && mkdir -p "$folder.partial"
  cp "$source" "$folder.partial/"
  npm install --silent --no-audit --no-fund --no-package-lock --prefix "$folder.partial" >/dev/null
  rm -rf "$folder" && mv "$folder.partial" "$folder"
}

# Installs the generator and the checker of the Python worker's types.
need_python_tools() {
  local folder=${XDG_CACHE_HOME:-$HOME/.cache}/prism-relay/python
  export PRISM_TEST_PYTHON_TOOLS=$folder/bin
  if cmp -s tests/types.requirements.txt "$folder/requirements.txt"; then return; fi
  need_package python3-venv /usr/lib/python3*/ensurepip
  echo "Fetching the generator and the checker of the Python worker's types ..."
  rm -rf "$folder" && python3 -m venv "$folder"
  "$folder/bin/pip" install --quiet --disable-pip-version-check --requirement tests/types.requirements.txt
  cp tests/types.requirements.txt "$folder/requirements.txt"
}

# Fetches promtool, which checks metrics and alert rules.
need_promtool() {
  if [[ ${PRISM_TEST_PROMTOOL-} ]] || command -v promtool >/dev/null; then return; fi
  take_out prometheus usr/bin/promtool
  export PRISM_TEST_PROMTOOL=$taken
}

# Fetches nginx, the proxy in front of two relays.
need_nginx() {
  if [[ ${PRISM_TEST_NGINX-} ]] || command -v nginx >/dev/null; then return; fi
  take_out nginx usr/sbin/nginx
  export PRISM_TEST_NGINX=$taken
}

# Extracts one program from its package, because installing the package would start a service. Sets $taken to its path.
take_out() {
  local package=$1 folder=${XDG_CACHE_HOME:-$HOME/.cache}/prism-relay/$1 download
  taken=$folder/$2
  if [[ -x $taken ]]; then return; fi
  if ! command -v apt-get >/dev/null; then
    echo "The suite needs ${2##*/}: put it on the PATH." >&2
    exit 1
  fi
  echo "Fetching ${2##*/} ..."
  mkdir -p "$folder"
  # apt downloads as the user _apt, who needs a readable folder.
  download=$(mktemp -d) && chmod 755 "$download"
  if ! (cd "$download" && { apt-get download -qq "$package" || { as_root apt-get update -qq && apt-get download -qq "$package"; }; }) >"$download/log" 2>&1; then
    cat "$download/log" >&2
    exit 1
  fi
  dpkg-deb -x "$download"/"$package"_*.deb "$folder"
  rm -rf "$download"
}

as_root() {
  if [[ $EUID == 0 ]]; then "$@"; else sudo "$@"; fi
}

# Runs RabbitMQ in a tree of a Debian release, which debootstrap makes once. Prints the version.
need_tree() {
  local release=$1 tree=${XDG_CACHE_HOME:-$HOME/.cache}/prism-relay/$1
  # The tree gets its name only when it is complete.
  if [[ ! -d $tree ]]; then make_tree "$release" "$tree"; fi
  export PRISM_TEST_RABBITMQ_ROOT=$tree
  echo "The suite runs on RabbitMQ $(dpkg-query --admindir="$tree/var/lib/dpkg" -W -f '${source:Upstream-Version}' rabbitmq-server), in $tree."
}

make_tree() {
  local release=$1 tree=$2 mirror
  if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "This makes a tree of Debian $release and runs RabbitMQ in it with chroot. It needs Debian or a derivative, and root." >&2
    exit 1
  fi
  command -v debootstrap >/dev/null || need_package debootstrap /usr/sbin/debootstrap

  echo "Making a tree of Debian $release with RabbitMQ in $tree (once, a few minutes) ..."
  rm -rf "$tree.partial" && mkdir -p "$tree.partial"
  # The mirror of this system's packages, or debootstrap's default if apt names none.
  # shellcheck disable=SC2016 # apt expands it
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' 'Origin: Debian' 2>/dev/null | grep -v security | head -n 1 || true)
  debootstrap --variant=minbase --include=rabbitmq-server "$release" "$tree.partial" ${mirror:+"$mirror"} >"$tree.log" 2>&1 || {
    tail -n 15 "$tree.log" >&2
    echo "debootstrap failed; the whole log is in $tree.log" >&2
    exit 1
  }
  # A node is named n1@localhost. A tree of sid has no package that writes this line.
  grep -qs localhost "$tree.partial/etc/hosts" || echo '127.0.0.1 localhost' >>"$tree.partial/etc/hosts"
  mv "$tree.partial" "$tree"
}

main "$@"
