# Sourced by the experiments: mia from the project's .venv, and a folder for what they write
# (first argument, default experiments/ in the current folder).
. "$(dirname "${BASH_SOURCE[0]}")/../_setup" smollm2 plots soft
out=${1:-experiments}
mkdir -p "$out"
mia() { "$venv/bin/mia" "$@"; }
