#!/usr/bin/env bash
# Checks that only a GPU can make, in under ten minutes; a part that fails leaves the others.
#
#   scripts/gpu_check.sh [FOLDER]     everything is written to FOLDER (default: $OUT, then scratch/gpu_check)
#   SCALE=tiny scripts/gpu_check.sh   the same with everything small, which a CPU does in a minute
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-${OUT:-scratch/gpu_check}} scale=${SCALE:-full} failed=0
mkdir -p "$out" && : >"$out/summary.txt"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

part() { # NAME SECONDS COMMAND...: its output goes to NAME.log, how it ended to summary.txt
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    [ "$scale" = tiny ] && limit=300 # a busy CPU may be slow
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=1
    echo "$name: exit code $code after $((SECONDS - began)) s" | tee -a "$out/summary.txt"
    tail -n 12 "$out/$name.log"
}

if [ "$scale" = tiny ]; then
    files=tests/test_training.py filter=learning_rate train=5
    sampling="--layers 1 --width 32 --heads 2 --codes 20 --tokens 8 --batch 2 --rounds 1"
else
    files="tests/test_captured.py tests/test_engine.py" train=480
    filter="gpu or cuda or scores or compile or waits"
    sampling="--layers 12 --width 1024 --heads 16 --codes 8192 --tokens 512 --batch 16 --rounds 1"
fi
part machine 60 python scripts/gpu_check.py machine
part tests 90 python -m pytest -q $files -k "$filter"
part precision 60 python scripts/gpu_check.py precision --scale "$scale"
part steps 90 python scripts/gpu_check.py steps --scale "$scale" --out "$out"
part sampling 60 python benchmarks/sampling.py $sampling
left=$((585 - SECONDS)) # of ten minutes
seconds=$((left < train ? left : train))
part train $((seconds + 30)) python scripts/gpu_check.py train --scale "$scale" --out "$out" --seconds "$seconds"
du -sh "$out"
exit $failed
