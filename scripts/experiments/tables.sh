#!/usr/bin/env bash
# All tasks: task vectors, then function vectors. Smaller than the defaults: an hour on two
# cores becomes a quarter of one.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
mia task-vector eval all --sets 4 --dummies 4 --test 40 --dev 20 -o "$out/task_vectors.json" --json -q >/dev/null
mia function-vector eval all --prompts 30 --effect-prompts 5 --test 40 --dev 20 \
    -o "$out/function_vectors.json" --json -q >/dev/null
"$venv/bin/python" "$(dirname "${BASH_SOURCE[0]}")/summary.py" "$out/task_vectors.json" "$out/function_vectors.json"
