#!/usr/bin/env bash
# One session from prompt to vector, by hand: see the task in the residual, save it, put it into
# a prompt without examples, take a word out of it.
# Adapted to a 135M model: Q:/A: lines and capitals in place of reversed sequences, which it does
# not do; --bos, without which it hardly reads the first line; layer 21 of 30.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
examples='Q: Egypt\nA: Cairo\n\nQ: Norway\nA: Oslo\n\nQ: Japan\nA: Tokyo\n\nQ: Italy\nA: Rome\n\nQ: Spain\nA:'
query='Q: Russia\nA:'
n=$(mia tokens --bos -p "$query" | tail -1 | awk '{print $1}')

echo "## the examples, their last token, layer by layer"
mia logit-lens l_out-16..24 --bos -p "$examples" --token-idx -1 -k 4
echo "## what attention adds there"
mia logit-lens kqv_out-18..22 --bos -p "$examples" --token-idx -1 -k 4 -q
echo "## no examples"
mia run --bos -p "$query" -n 1 -q
echo "## the residual after the examples in the place of token $n"
mia save l_out-21 "$out/capital.safetensors" --bos -p "$examples" -q
mia patch l_out-21 "$out/capital.safetensors" --to-token-idx "$n" --bos -p "$query" -n 1 -q
echo "## without the direction of ' Moscow' at the end"
mia patch l_out-29 --subtract-token ' Moscow' --to-token-idx -1 --bos -p "${examples/Spain/Russia}" -n 1 -q
