#!/usr/bin/env bash
# All checks that need a GPU: bash benchmarks/on_a_gpu.sh VIDEOS OUT [STEP...]
# Steps, with their limits in minutes: tests 3, loader 4, soak 1, model 4, fit 3, train 3, resume 4 (default: all). Each
# has a log in OUT. After a step that fails the others run; the exit status is the number of failed steps.
# PYTHON: another interpreter than .venv's; DEVICE=cpu tries train and resume without a GPU.
set -u
[ $# -ge 2 ] || { echo "usage: bash $0 VIDEOS OUT [STEP...]" >&2; exit 64; }
videos=$(realpath "$1") out=$2
shift 2
steps=${*:-tests loader soak model fit train resume}
python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cuda}
failed=0
mkdir -p "$out"

step() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 began=$SECONDS status
    shift 2
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ $status = 0 ] || failed=$((failed + 1))
    echo "$name: exit status $status, $((SECONDS - began)) s" | tee -a "$out/summary.txt"
    tail -n 25 "$out/$name.log"
}

train() { # `benchmark.py train` on copies with groups of 16 frames.
    set -e
    "$python" prepare.py index --list <(cd "$videos" && ls | sed 's/$/ 0/') --root "$videos" --out "$out/videos.csv"
    "$python" prepare.py transcode -m "$out/videos.csv" --out "$out/gop16"
    { grep '^#' "$out/gop16/videos.csv"; grep -v '^#' "$out/gop16/videos.csv" | head -n 1
      for _ in $(seq 400); do grep -v '^#' "$out/gop16/videos.csv" | tail -n +2; done; } >"$out/gop16/many.csv"
    "$python" benchmark.py train -c configs/pptimesformer_k400.yaml -o "data.train=$out/gop16/many.csv" device="$device" \
        optim.global_batch_size=32 train.compile=true $train_settings --steps 20 --rounds 2 --out "$out"
}

resume() { # A compiled run that is killed with -9 and resumed must give the weights of an unbroken run.
    set -e
    rm -rf "$out/whole" "$out/parts"
    "$python" prepare.py demo --out "$out/demo"
    local run=("$python" train.py -c configs/demo.yaml -o "data.train=$out/demo/train.csv" "data.val=$out/demo/val.csv"
        device="$device" train.compile=true train.max_steps=100 train.checkpoint_every_steps=25 $resume_settings)
    "${run[@]}" "output=$out/whole"
    "${run[@]}" "output=$out/parts" &
    until compgen -G "$out/parts/checkpoints/step_0000005*" >/dev/null; do sleep 0.2; done
    kill -9 $!
    wait || true
    "${run[@]}" "output=$out/parts" --resume
    "$python" - "$out/whole/last.safetensors" "$out/parts/last.safetensors" <<'END'
import sys
from safetensors.torch import load_file
whole, parts = map(load_file, sys.argv[1:])
different = [name for name in whole if not whole[name].equal(parts[name])]
sys.exit(f"different: {', '.join(different)}" if different else print("bit-equal after kill -9 and --resume"))
END
}

# 197 tokens are several blocks of keys, which attention must add up in the same order.
train_settings='' resume_settings='data.crop_size=224 model.drop_path=0.1'
if [ "$device" = cpu ]; then
    train_settings='model.embed_dim=48 model.depth=2 model.num_heads=3 data.crop_size=64'
    resume_settings='optim.global_batch_size=4 model.drop_path=0.1'
fi
export -f train resume
export python videos out device train_settings resume_settings
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/summary.txt"
for name in $steps; do
    case $name in
        tests) step tests 180 "$python" -m pytest -q -m gpu tests ;;
        loader) step loader 220 "$python" benchmark.py loader "$videos" --quick --out "$out" ;;
        soak) step soak 60 "$python" benchmark.py soak "$videos" --clips 4000 --workers 8 --batch-size 32 --sizes 24 ;;
        model) step model 250 "$python" benchmark.py model --device cuda --quick --out "$out" ;;
        fit) step fit 180 "$python" benchmark.py model --device cuda --fit --out "$out" ;;
        train) step train 180 bash -c train ;;
        resume) step resume 240 bash -c resume ;;
        *) echo "no step $name" >&2; exit 64 ;;
    esac
done
exit $failed
