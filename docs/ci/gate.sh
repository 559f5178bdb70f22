#!/usr/bin/env bash
# Check that a quantized model meets its limits and is as good as the last one that was accepted.
#
#   gate.sh MODEL [BASELINE.json] [more options of `gemma-awq bench`]
#
# Writes bench.json. Exits with 0, or with 3 and a line on stderr for each limit that is not met. To accept a model, commit
# its bench.json as the baseline. Only fidelity is limited here, because the speed of a shared runner varies: on your own
# machine, add --speed --min-decode-tps 50 --max-rss 2GB.
set -euo pipefail

model=$1
baseline=${2:-}
options=(--fidelity --max-kl "${MAX_KL:-0.25}" --max-ppl-ratio "${MAX_PPL_RATIO:-1.25}")
if [[ -n $baseline && -f $baseline ]]; then
  options+=(--baseline "$baseline" --tolerance "${TOLERANCE:-0.05}")
elif [[ -n $baseline ]]; then
  echo "There is no $baseline yet: commit bench.json under that name to compare with it." >&2
fi

code=0
gemma-awq bench "$model" --json "${options[@]}" "${@:3}" > bench.json || code=$?
if [[ $code -eq 3 ]]; then
  echo "$model is not good enough; bench.json has the figures." >&2
fi
exit "$code"
