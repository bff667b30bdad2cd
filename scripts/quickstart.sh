#!/usr/bin/env bash
# From a bare machine to a model trained by PPO: set-up, warm start, reward model, PPO, and a table of what came out. ZeRO-3 on every
# GPU there is, else on two CPU ranks. Called again it goes on where it was stopped, or prints the table of the finished run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat >&2 <<'END'
usage: scripts/quickstart.sh [--seed N] [--run_dir FOLDER] [--fresh]
  --seed N          decides words, initial weights, order and noise (default 0)
  --run_dir FOLDER  where everything is written (default runs/quickstart)
  --fresh           start anew; what is in the folder is kept as FOLDER-1, FOLDER-2, ...
END
    exit 2
}

seed=0 run=runs/quickstart fresh=false
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) [[ "${2:-}" =~ ^[0-9]+$ ]] || usage; seed="$2"; shift 2 ;;
        --run_dir) [ -n "${2:-}" ] || usage; run="${2%/}"; shift 2 ;;
        --fresh) fresh=true; shift ;;
        *) usage ;;
    esac
done

if $fresh && [ -e "$run" ]; then
    number=1
    while [ -e "$run-$number" ]; do number=$((number + 1)); done
    mv "$run" "$run-$number"
    echo "quickstart: the old run is kept in $run-$number"
fi
if [ -f "$run/seed" ] && [ "$(cat "$run/seed")" != "$seed" ]; then
    echo "quickstart: $run was made with --seed $(cat "$run/seed"); give that seed, --fresh, or another --run_dir" >&2
    exit 1
fi

scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
if [ -f "$run/seconds/ppo" ]; then
    echo "quickstart: $run is finished (--fresh starts anew); its table:"
    exec python scripts/quickstart_report.py "$run"
fi
mkdir -p "$run/seconds"
echo "$seed" >"$run/seed"

# A port of our own, so that another job on this machine is not in the way.
read -r gpus port < <(python -c 'import socket, torch; s = socket.socket(); s.bind(("", 0)); print(torch.cuda.device_count(), s.getsockname()[1])')
ranks=$((gpus > 0 ? gpus : 2))
if [ "$gpus" -gt 0 ]; then
    launch=(deepspeed --quiet --num_gpus "$ranks")
else
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
    launch=(deepspeed --quiet --num_accelerators "$ranks")
fi
echo "quickstart: seed $seed, $ranks ranks on $([ "$gpus" -gt 0 ] && echo GPUs || echo CPU), everything goes to $run"
[ "$gpus" -gt 0 ] || echo "quickstart: the very first start compiles DeepSpeed's CPU communication, which takes about a minute"

# $1: name, the rest: command. Left out when it is done already; its seconds go into the table.
stage() {
    local name="$1" start="$SECONDS"
    shift
    echo
    if [ -f "$run/seconds/$name" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    "$@"
    echo $((SECONDS - start)) >"$run/seconds/$name"
}

# $1: recipe, the rest: overrides. Every optimizer step has 128 rows: one forward on each rank.
train() {
    local recipe="$1"
    shift
    "${launch[@]}" --master_port "$port" train_rlhf.py --config "scripts/recipes/quickstart_$recipe.yaml" \
        run_dir="$run/$recipe" seed="$seed" train.micro_batch=$(((128 + ranks - 1) / ranks)) "$@"
}

warm="$run/sft/checkpoints/latest/hf"
stage data python scripts/quickstart_data.py --out "$run" --seed "$seed"
stage sft train sft actor.path="$run/model" data.train.path="$run/data/warm_start.jsonl"
stage pairs python scripts/quickstart_pairs.py --model "$warm" --words "$run/data/reward_model.jsonl" \
    --train "$run/data/pairs.jsonl" --held_out "$run/data/pairs_held_out.jsonl" --seed "$seed"
stage reward_model train reward_model reward_model.path="$warm" \
    data.train.path="$run/data/pairs.jsonl" validation.data.path="$run/data/pairs_held_out.jsonl"
stage ppo train ppo actor.path="$warm" data.train.path="$run/data/ppo.jsonl" validation.data.path="$run/data/held_out.jsonl" \
    reward.components.0.model.path="$run/reward_model/checkpoints/latest/hf"
echo
python scripts/quickstart_report.py "$run"
