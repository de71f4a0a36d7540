#!/usr/bin/env bash
# Submits a run of elder_jax to Slurm, on GPU nodes; it goes on by itself after its time is up, after preemption and after the
# loss of a node. Call it where the virtual environment is active and the folder is that of the repository, both on storage
# that all nodes share.
#
#   launch/slurm.sh [--dry-run] --nodes=N --gpus-per-node=G --time=TIME [options] -- --flagfile=configs/X.flags [--flag=value ...]
#
#   --nodes=N            nodes
#   --gpus-per-node=G    GPUs of each node, all of which are used
#   --time=TIME          limit of one go, as sbatch has it; the run goes on in the next
#   --name=NAME          name of the job and of its log, NAME-JOB.log; default: elder_jax
#   --grace=SECONDS      from SIGTERM to the end of the time: enough for a checkpoint; default: 180
#   --sbatch=FLAG        one more flag for sbatch, as in --sbatch=--partition=gpu; repeatable
#
# One process for each GPU: under Slurm, JAX gives a process the one device whose number is its rank on the node. So each
# process must see all GPUs of its node, which --gpu-bind=none makes sure of.
#
# Exit status of the job: that of elder_jax; with 75, stopped with a checkpoint written, it requeues itself.
#
# Environment: PYTHON, the interpreter; default: python
set -euo pipefail
python=${PYTHON:-python}

# In the job, where Slurm runs a copy of this file. SIGTERM goes to the processes, not to this shell: it must live to see
# their status. After scancel it gets one as well and dies of it, so that a job which was cancelled does not come back.
if [[ ${1:-} == --in-job ]]; then
  shift
  status=0
  # The others of one that has left may still be writing the checkpoint: JAX itself ends those that wait for a dead one.
  srun --kill-on-bad-exit=0 --gpu-bind=none "$python" -m elder_jax.main "$@" || status=$?
  if ((status == 75)); then
    echo 'launch/slurm.sh: stopped with a checkpoint written; the job goes back into the queue' >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
fi

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
dry_run=no nodes='' gpus='' limit='' name=elder_jax grace=180 more=()
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage && exit ;;
    --dry-run) dry_run=yes ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus-per-node=*) gpus=${1#*=} ;;
    --time=*) limit=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --sbatch=*) more+=("${1#*=}") ;;
    --) shift && break ;;
    *) refuse "'$1' is unknown: the flags of elder_jax come after --" ;;
  esac
  shift
done
[[ -n $nodes ]] || refuse '--nodes is missing: give the number of nodes'
[[ -n $gpus ]] || refuse '--gpus-per-node is missing: give the number of GPUs of a node'
[[ -n $limit ]] || refuse '--time is missing: give the limit of one go, as in --time=12:00:00'
[[ -n $name ]] || refuse '--name is empty'
[[ $# -gt 0 ]] || refuse 'the flags of elder_jax are missing: give them after --, as in -- --flagfile=configs/llama7b.flags'
whole --nodes "$nodes"
whole --gpus-per-node "$gpus"
whole --grace "$grace"
need sbatch 'call this where jobs are submitted'

submit=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks=$((nodes * gpus))" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus"
  "--time=$limit" --requeue --open-mode=append "--signal=TERM@$grace" "--output=$name-%j.log" "${more[@]}"
  "${BASH_SOURCE[0]}" --in-job "$@")
act "${submit[@]}"
if [[ $dry_run == yes ]]; then
  echo '# in the job:'
  show srun --kill-on-bad-exit=0 --gpu-bind=none "$python" -m elder_jax.main "$@"
  echo '# after exit status 75:'
  # shellcheck disable=SC2016
  echo '+ scontrol requeue "$SLURM_JOB_ID"'
fi
