#!/usr/bin/env bash
# All that only a GPU can show of the loader, in about six minutes: bash benchmarks/on_a_gpu.sh VIDEOS OUT
# A log for each step in OUT, which goes on where one fails; PYTHON names another interpreter than .venv's.
set -u
videos=$1 out=$2
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"

step() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1
    echo "$name: exit status $?, $((SECONDS - began)) s" | tee -a "$out/summary.txt"
    tail -n 25 "$out/$name.log"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/summary.txt"
step tests 120 "$python" -m pytest -q -m gpu tests/dali_pipelines
step loader 220 "$python" benchmark.py loader "$videos" --quick --out "$out"
step soak 60 "$python" benchmark.py soak "$videos" --clips 4000 --workers 8 --batch-size 32 --sizes 24
