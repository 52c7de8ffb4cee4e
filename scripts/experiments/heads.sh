#!/usr/bin/env bash
# Effects of all heads as a heatmap, and the function vectors' decoded vocabulary: Todd et al.
# 2023, figure 3 and table 3. Plain and symmetric country and capital side by side.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for task in present_past antonym country_capital country_capital_sym uppercase; do
    mia function-vector train "$task" -o "$out/fv_$task.safetensors" --plot "$out/heads_$task.svg" \
        --prompts 50 --effect-prompts 10 --seed 10 -q
    mia function-vector eval "$task" --vector "$out/fv_$task.safetensors" --seed 10 -q
done
