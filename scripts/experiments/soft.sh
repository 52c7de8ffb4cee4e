#!/usr/bin/env bash
# Soft vectors, 2,000 evaluations at most, against plain vectors and examples.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for task in antonym first_letter country_capital uppercase; do
    mia soft-vector train "$task" -o "$out/soft_$task.safetensors" --plot "$out/soft_$task.svg" --seed 10 -q | tail -1
    mia soft-vector eval "$task" "$out/soft_$task.safetensors" --sparse --compare --seed 10 -q
done
