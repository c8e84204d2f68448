#!/usr/bin/env bash
# The long soaks: random faults from a seed under steady traffic. Each prints its counts, and ends with 1 if an event is
# lost. The suite runs the same tests for half a minute.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: ./tests/soak.sh [--lost-webhooks] [--minutes N] [--seed S]

  --lost-webhooks  another soak: the relay is away for longer than Prism tries (ten times faster than Prism does), again
                   and again, and asks a stand-in of Prism's API for what it did not get
  --minutes N  how long it makes faults, 30 by default; fractions such as 0.5 work
  --seed S     the seed of the faults; a random one by default, which the ledger shows
  -h, --help   this text

Only the seed decides the faults and their order; their effects depend on the timing of the machine.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=30
test=soak::nothing_acknowledged_is_lost
seed=$RANDOM
while (($#)); do
  case $1 in
    --lost-webhooks) test=soak::lost::the_ends_that_prism_gave_up_on_come_by_the_api_once_and_in_order ;;
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
exec ./tests/run.sh --release --test suite -- "$test" --exact --nocapture
