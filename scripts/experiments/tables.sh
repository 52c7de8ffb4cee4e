#!/usr/bin/env bash
# The three tasks with a mark to reach, by what the model knows of them; then all tasks, smaller than
# by default: task vectors, function vectors.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
mia task-vector eval country_capital antonym uppercase --known --seed 10 --repeats 3 -q
mia task-vector eval all --sets 4 --dummies 4 --test 40 --dev 20 --seed 10 -o "$out/task_vectors.json" -q >/dev/null
mia function-vector eval all --prompts 30 --effect-prompts 5 --test 40 --dev 20 --seed 10 \
    -o "$out/function_vectors.json" -q >/dev/null
"$venv/bin/python" "$(dirname "${BASH_SOURCE[0]}")/summary.py" "$out/task_vectors.json" "$out/function_vectors.json"
