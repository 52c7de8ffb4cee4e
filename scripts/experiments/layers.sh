#!/usr/bin/env bash
# Accuracy by layer of task vectors, as a table and a figure: Hendel et al. 2023, figure 3.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
mia task-vector eval uppercase present_past country_capital_known --sets 8 --seed 10 \
    --by-layer --plot "$out/layers.svg"
