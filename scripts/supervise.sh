#!/usr/bin/env bash
# Starts a job, and starts it again when it fails: it goes on from its newest checkpoint.
#
#     scripts/supervise.sh deepspeed --num_gpus 8 train_rlhf.py --config recipe.yaml
#
# Stops, with the job's exit code, when the job is done, refuses its recipe (2), cannot go on from bad numbers (77), or has failed FAILURES times (4) without a new
# checkpoint in between; waits longer from time to time. SIGTERM, SIGUSR1 or Ctrl-C: all ranks save at their next common boundary and leave; then it ends with 75, "start me again".
# What every attempt that failed has printed is kept in RUN_DIR/attempts. No process of an attempt outlives it.
set -uo pipefail

failures_allowed=${FAILURES:-4}
grace=${GRACE:-60}         # seconds in which ranks may save and leave when their launcher is gone
longest_pause=${PAUSE:-300} # seconds between two attempts, at most; the first is 5

if [ $# -eq 0 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

RLHF_CONTROL=$(mktemp -d)
RLHF_STARTED=$(date +%s)
export RLHF_CONTROL RLHF_STARTED
job=
failed=0
mark=
budget=$(cksum < /dev/null)
log=$RLHF_CONTROL/log

say() { echo "supervise: $*" >&2; }
# What an attempt has started carries this in its environment, in whatever session it is: torchrun gives each rank one of its own.
members() { grep -lszFx "RLHF_ATTEMPT=$RLHF_CONTROL/$attempt" /proc/[0-9]*/environ | cut -d/ -f3; }
alive() { kill -0 -- "-$job" 2>/dev/null || [ -n "$(members)" ]; }

ask() {
    echo "$1 at the supervisor" > "$RLHF_CONTROL/stop.new" && mv "$RLHF_CONTROL/stop.new" "$RLHF_CONTROL/stop"
    [ -n "$pause" ] && kill "$pause" 2>/dev/null
}
pause=
trap 'ask SIGTERM' TERM
trap 'ask SIGUSR1' USR1
trap 'ask SIGINT' INT

leave() {
    rm -rf "$RLHF_CONTROL"
    exit "$1"
}

keep_log() {  # the evidence
    local folder
    folder=$(cat "$RLHF_CONTROL/run_dir" 2>/dev/null) || return 0
    mkdir -p "$folder/attempts" && cp "$log" "$folder/attempts/$(date +%Y%m%d-%H%M%S)-exit-$1.log" && say "what it printed: $folder/attempts"
}

for ((attempt = 1; ; attempt++)); do
    rm -f "$RLHF_CONTROL/left" "$RLHF_CONTROL/code"
    # A session and a process group of its own, so that all of it can be found, and so that a signal to ours does not end its launcher.
    RLHF_ATTEMPT=$RLHF_CONTROL/$attempt setsid "$@" > >(trap '' INT TERM HUP USR1; exec tee "$log") 2>&1 &
    job=$!
    while kill -0 "$job" 2>/dev/null; do
        wait "$job"  # a signal to us ends the waiting, not the job
    done
    wait "$job"
    code=$?
    for ((i = 0; i < grace * 10; i++)); do
        alive || break
        sleep 0.1
    done
    alive && say "processes were left after $grace s: killed" && kill -KILL -- "-$job" $(members) 2>/dev/null
    for ((i = 0; i < 50; i++)); do
        alive || break
        sleep 0.1
    done

    [ "$code" -ne 0 ] && [ -s "$RLHF_CONTROL/code" ] && code=$(cat "$RLHF_CONTROL/code")  # torchrun and accelerate end with 1 whatever their ranks do
    # DeepSpeed's launcher ends with 0 when the process below it was killed.
    if [ "$code" -eq 0 ] && { [ -e "$RLHF_CONTROL/done" ] || [ ! -e "$RLHF_CONTROL/run_dir" ]; }; then
        leave 0
    fi
    if [ -e "$RLHF_CONTROL/left" ]; then
        say "saved and left: $(cat "$RLHF_CONTROL/left")"
        leave 75
    fi
    [ "$code" -eq 2 ] && leave 2
    [ "$code" -eq 77 ] && leave 77
    keep_log "$code"
    if [ -e "$RLHF_CONTROL/stop" ]; then
        say "asked to leave, and the job ended with $code: the newest checkpoint is an older one"
        leave 75
    fi
    newest=$(readlink "$(cat "$RLHF_CONTROL/run_dir" 2>/dev/null)/checkpoints/latest" 2>/dev/null || echo none)
    smaller=$(cat "$(cat "$RLHF_CONTROL/run_dir" 2>/dev/null)/budget.json" 2>/dev/null | cksum)
    if [ "$code" -eq 75 ] && [ "$smaller" != "$budget" ]; then
        failed=0  # memory ran out: with the smaller budget, which has an end, it is another job
        budget=$smaller
    elif [ "$newest" = "$mark" ]; then
        failed=$((failed + 1))
    else
        failed=1
        mark=$newest
    fi
    if [ "$failed" -ge "$failures_allowed" ]; then
        say "attempt $attempt ended with $code: failure $failed after the same checkpoint ($newest). Not started again."
        leave $((code == 0 ? 1 : code))
    fi
    seconds=$((5 << failed >> 1))
    [ "$seconds" -gt "$longest_pause" ] && seconds=$longest_pause
    say "attempt $attempt ended with $code, newest checkpoint: $newest. Next attempt in $seconds s."
    sleep "$seconds" &
    pause=$!
    [ -e "$RLHF_CONTROL/stop" ] && leave 75
    wait "$pause"
    pause=
    [ -e "$RLHF_CONTROL/stop" ] && leave 75
done
