#!/bin/bash
# One job over several nodes, a worker on each:
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=16 --time=8:00:00 launch/cluster/slurm.sh \
#     --prompts_file prompts.csv --out DIR --elastic
#
# or many small jobs that start whenever there is room for one:
#
#   sbatch --array=0-7 --gpus=1 --cpus-per-task=8 --time=2:00:00 launch/cluster/slurm.sh \
#     --prompts_file prompts.csv --out DIR
#
# The arguments are those of launch.generate; sbatch's own options, which override those below, go before the
# name of this script. Every worker finds its part by its number in the job and in the array; with --elastic
# they share the work as it comes. Paths are seen from the folder where sbatch is called.
# FOGSCULPT_PYTHON: the python that has fogsculpt; without it the one on PATH.
#
# Preempted, near its time limit, or a node lost: the job goes back into the queue and later on where it was.
#SBATCH --job-name=fogsculpt
#SBATCH --output=fogsculpt-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
set -uo pipefail

# By its job number alone the last task of an array is the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

running() { # false where the job is being cancelled, or SLURM itself puts it back into the queue
  [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]
}

# shellcheck disable=SC2317,SC2329 # called by the trap
stop() {
  ! running || scancel --signal=TERM "$job" # to every worker; srun would kill them on the spot
}
trap stop TERM

# A worker that is done or broken is no reason to stop the others.
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --label --input=none \
  ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
  "${FOGSCULPT_PYTHON:-python}" -u -m launch.generate "$@" &
workers=$!

while kill -0 "$workers" 2>/dev/null; do # a signal ends the wait, not the workers
  wait "$workers"
done
wait "$workers"
code=$?

# The highest of the workers'. 0: all done. 1: done, and some rows could not be drawn. 2: a mistake in the
# arguments. 75: a network failed for longer than --patience, or hosts did not meet; the same command goes on.
# 143: stopped with SIGTERM, and there is more to do.
if [ "$code" = 143 ] && running; then
  echo "stopped with exit code $code: back into the queue" >&2
  scontrol requeue "$job"
fi
exit "$code"
