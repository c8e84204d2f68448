#!/usr/bin/env bash
# The long soak: random faults from a seed under steady traffic. It prints a ledger, and ends with 1 if an event is lost.
# The suite runs the same test for half a minute.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: ./tests/soak.sh [--minutes N] [--seed S]

  --minutes N  how long it makes faults, 30 by default; fractions such as 0.5 work
  --seed S     the seed of the faults; a random one by default, which the ledger shows
  -h, --help   this text

Only the seed decides the faults and their order; their effects depend on the timing of the machine.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=30
seed=$RANDOM
while (($#)); do
  case $1 in
    --minutes) minutes=${2-} && shift ;;
    --seed) seed=${2-} && shift ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 64 ;;
  esac
  shift
done
if ! [[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ && $seed =~ ^[0-9]+$ ]]; then
  usage >&2
  exit 64
fi

export PRISM_SOAK_MINUTES=$minutes PRISM_SOAK_SEED=$seed
exec ./tests/run.sh --release --test suite -- soak::nothing_acknowledged_is_lost --exact --nocapture
