#!/usr/bin/env bash
# The long soak: random faults, drawn from a seed, under steady traffic; ends with a ledger, and with 1 if anything is lost.
# The suite runs the same test for half a minute.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: ./tests/soak.sh [--minutes N] [--seed S]

  --minutes N  how long faults are made, 30 by default; fractions such as 0.5 are fine
  --seed S     the number that the faults are drawn from; a new one by default, which the ledger tells
  -h, --help   this text

The faults and their order depend on the seed alone; what they hit depends on the machine.
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
