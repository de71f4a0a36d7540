#!/usr/bin/env bash
# Submits a run of elder_jax to GPU nodes under Slurm. It resumes by itself after its time limit, after preemption and after
# the loss of a node. Call it in the folder of the repository with the virtual environment active; both must be on storage
# that all nodes share.
#
#   launch/slurm.sh [--dry-run] --nodes=N --gpus-per-node=G --time=TIME [options] -- --flagfile=configs/X.flags [--flag=value ...]
#
#   --nodes=N            number of nodes
#   --gpus-per-node=G    GPUs of each node; all are used
#   --time=TIME          time limit of the job, in the format of sbatch; the requeued job resumes the run
#   --name=NAME          name of the job and of its log, NAME-JOB.log; default: elder_jax
#   --grace=SECONDS      from SIGTERM to the time limit, enough to write a checkpoint; default: 180
#   --sbatch=FLAG        another flag for sbatch, such as --sbatch=--partition=gpu; repeatable
#
# Runs one process per GPU: under Slurm, JAX gives each process the device whose index is its rank on the node. So each
# process must see all GPUs of its node, which --gpu-bind=none ensures.
#
# The exit status of the job is that of elder_jax. After 75 (stopped, checkpoint written) the job requeues itself.
#
# Environment: PYTHON, the interpreter; default: python
set -euo pipefail
python=${PYTHON:-python}

# This part runs in the job, from Slurm's copy of this file. Before the time limit, SIGTERM goes to the processes but not to
# this shell, which must read their status. scancel also kills this shell, so a cancelled job is not requeued.
if [[ ${1:-} == --in-job ]]; then
  shift
  status=0
  # kill-on-bad-exit=0: when one process exits, others may still be writing the checkpoint. JAX itself ends processes that
  # wait for a dead one.
  srun --kill-on-bad-exit=0 --gpu-bind=none "$python" -m elder_jax.main "$@" || status=$?
  if ((status == 75)); then
    echo 'launch/slurm.sh: stopped, checkpoint written; requeuing the job' >&2
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
[[ -n $gpus ]] || refuse '--gpus-per-node is missing: give the number of GPUs per node'
[[ -n $limit ]] || refuse '--time is missing: give the time limit of the job, as in --time=12:00:00'
[[ -n $name ]] || refuse '--name is empty: give the job a name'
[[ $# -gt 0 ]] || refuse 'the flags of elder_jax are missing: give them after --, as in -- --flagfile=configs/llama7b.flags'
whole --nodes "$nodes"
whole --gpus-per-node "$gpus"
whole --grace "$grace"
need sbatch 'call this script on a login node of the cluster'

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
