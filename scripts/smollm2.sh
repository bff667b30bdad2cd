#!/usr/bin/env bash
# A real pretrained model, SmolLM2-135M-Instruct, learns small sums by GRPO with LoRA and a verifier: on every GPU there is, else on two CPU
# ranks (eight minutes on two idle cores). Further arguments are overrides of scripts/recipes/smollm2_grpo.yaml. Called again it goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
python scripts/smollm2.py --out models/smollm2-135m-instruct

run=runs/smollm2-grpo
for argument in "$@"; do
    case "$argument" in run_dir=*) run="${argument#run_dir=}" ;; esac
done
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -gt 0 ]; then
    launch=(deepspeed --quiet --num_gpus "$gpus")
else
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
    launch=(deepspeed --quiet --num_accelerators 2)
fi
"${launch[@]}" train_rlhf.py --config scripts/recipes/smollm2_grpo.yaml "$@"
python scripts/report.py "$run"
