#!/usr/bin/env bash
# Builds the Debian package: the release binary, its man page and completions, then the package by cargo-deb, which reads
# [package.metadata.deb] in Cargo.toml. Prints the path of the package, and lintian's findings if lintian is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# CARGO_TARGET_DIR would put the binary elsewhere.
unset CARGO_TARGET_DIR CARGO_BUILD_TARGET
relay=target/release/prism-relay
assets=target/debian-assets

# Not stripped: cargo-deb moves the debug information into a package of its own.
CARGO_PROFILE_RELEASE_STRIP=none cargo build --release --locked --features otlp
if [[ $(target/tools/bin/cargo-deb --version 2>/dev/null) != *3.8.0 ]]; then
  cargo install --quiet --locked --root target/tools --version 3.8.0 cargo-deb
fi

rm -rf "$assets" && mkdir -p "$assets/man"
"$relay" man "$assets/man"
for shell in bash zsh fish; do "$relay" completions "$shell" >"$assets/prism-relay.$shell"; done

rm -f target/debian/prism-relay*deb
target/tools/bin/cargo-deb deb --quiet --no-build --locked --dbgsym >/dev/null
package=$(echo "$PWD"/target/debian/prism-relay_*.deb)
echo "$package"
if command -v lintian >/dev/null; then lintian --no-cfg "$package" || true; fi
