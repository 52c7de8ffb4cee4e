#!/usr/bin/env bash
# Accuracy by layer of task vectors, as a table and a figure: Hendel et al. 2023, figure 3.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
mia task-vector eval uppercase present_past country_capital_known --sets 8 \
    --by-layer --plot "$out/layers.svg" -o "$out/layers.json"
"$venv/bin/python" - "$out/layers.json" <<'PY'
import json, sys
rows = json.load(open(sys.argv[1]))["rows"]
print("layer  " + "  ".join(r["task"] for r in rows))
for i in rows[0]["by_layer"]:
    cells = [f"{r['by_layer'][i]['accuracy']:.2f}".rjust(len(r["task"])) for r in rows]
    print(f"{i:>5}  " + "  ".join(cells))
PY
