#!/usr/bin/env bash
# Makes the rows of one pass over the text (benchmarks/results.py) with N processes that share one accelerator:
#   benchmarks/results_shared.sh N --model=… --wikitext=… --news=… [--workdir=… --rows=… --tasks_dir=…]
# First the search for learning rates, then the rows that need its result, then the pages. Finished rows are not repeated.
set -euo pipefail
parts=$1
shift
fraction=$(printf '.%03d' $((920 / parts)))
export PYTHONUNBUFFERED=1
for only in 'one pass/final/dense,one pass/search' 'one pass/'; do
  pids=()
  for ((i = 0; i < parts; i++)); do
    XLA_PYTHON_CLIENT_MEM_FRACTION=$fraction python3 -m benchmarks.results --only="$only" --part="$i/$parts" "$@" &
    pids+=($!)
  done
  failed=
  for pid in "${pids[@]}"; do wait "$pid" || failed=yes; done
  if [ "$failed" ]; then
    echo "results_shared: a part failed, see above; fix it and rerun the same command." >&2
    exit 1
  fi
done
python3 -m benchmarks.results --only='one pass/' "$@"
