#!/usr/bin/env bash
# Vector algebra: v(AD) = v(BD) - v(BC) + v(AC), Todd et al. 2023, table 4.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
mia function-vector compose --shots 5 --prompts 30 --effect-prompts 5 --test 40 --dev 20 --seed 10 -q
