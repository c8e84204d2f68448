#!/bin/bash
# Makes the certificates and keys of this folder, which rcgen cannot make: old versions, weak or unsupported keys, and
# keys with a passphrase. They protect nothing. The tests of src/tls read them.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
days=36500

# root NAME KEY_OPTIONS...: an authority
root() {
  local name=$1 && shift
  openssl genpkey "${@:1}" -out "$work/$name.key"
  openssl req -x509 -new -key "$work/$name.key" -days $days -subj "/CN=$name" -out "$name.crt" \
    -addext 'basicConstraints=critical,CA:TRUE'
}

# leaf NAME ROOT EXTENSIONS KEY_OPTIONS...: a certificate for localhost, with its key
leaf() {
  local name=$1 root=$2 extensions=$3 && shift 3
  openssl genpkey "$@" -out "$name.key"
  openssl req -new -key "$name.key" -subj /CN=localhost -out "$work/$name.csr"
  openssl x509 -req -in "$work/$name.csr" -CA "$root.crt" -CAkey "$work/$root.key" -CAcreateserial -days $days \
    ${extensions:+-extfile <(printf '%s' "$extensions")} -out "$name.crt"
  rm -f "$root.srl"
}

names='subjectAltName=DNS:localhost'
p256=(-algorithm EC -pkeyopt ec_paramgen_curve:P-256)
root root "${p256[@]}"
root p521-root -algorithm EC -pkeyopt ec_paramgen_curve:P-521
root rsa1024-root -algorithm RSA -pkeyopt rsa_keygen_bits:1024
leaf v1 root '' "${p256[@]}"
leaf p521 root "$names" -algorithm EC -pkeyopt ec_paramgen_curve:P-521
leaf secp256k1 root "$names" -algorithm EC -pkeyopt ec_paramgen_curve:secp256k1
leaf rsa1024 root "$names" -algorithm RSA -pkeyopt rsa_keygen_bits:1024
leaf rsa2048 root "$names" -algorithm RSA -pkeyopt rsa_keygen_bits:2048
leaf by-p521 p521-root "$names" "${p256[@]}"
leaf by-rsa1024 rsa1024-root "$names" "${p256[@]}"
openssl pkey -in rsa2048.key -aes256 -passout pass:secret -out encrypted.key
openssl rsa -in rsa2048.key -traditional -aes256 -passout pass:secret -out encrypted-traditional.key
openssl req -new -key rsa2048.key -subj /CN=localhost -out request.csr
openssl x509 -in rsa2048.crt -outform der -out rsa2048.der
openssl x509 -in rsa2048.crt -trustout -out trusted.crt
openssl pkey -in rsa2048.key -pubout -out public.key
rm -f by-*.key
