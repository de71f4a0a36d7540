#!/usr/bin/env bash
# Runs elder_jax on a TPU VM pod: requests the pod as a queued resource, waits, mounts the shared storage, installs, runs on
# all hosts, and resumes on a new pod after preemption. Started again, it finds the pod and resumes or watches the run.
#
#   launch/tpu_pod.sh [--dry-run] [options] -- --flagfile=configs/X.flags [--flag=value ...]
#
#   --project=ID             ELDER_PROJECT           project of Google Cloud
#   --zone=ZONE              ELDER_ZONE              zone of the pod; the storage should be near it
#   --name=NAME              ELDER_NAME              name of the pod and of its queued resource
#   --accelerator-type=TYPE  ELDER_ACCELERATOR_TYPE  such as v5litepod-16, v5p-128, v6e-16
#   --runtime-version=V      ELDER_RUNTIME_VERSION   machine image: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p,
#                                                    v2-alpha-tpuv6e for v6e, tpu-ubuntu2204-base for v4
#   --bucket=NAME            ELDER_BUCKET            storage at /mnt/elder on all hosts: a bucket ...
#   --nfs=IP:/SHARE          ELDER_NFS               ... or a share of Filestore or another NFS server
#   --spot                                           use spot TPUs: cheaper, can be preempted
#   --create-flag=FLAG                               another flag for the queued resource, such as --create-flag=--reserved;
#                                                    repeatable
#   --max-failures=N                                 failures, except preemptions, before it gives up; default: 3
#   --delete                                         delete the pod at the end, also after a failure
#
# The default --workdir is /mnt/elder/runs/NAME. Ctrl-C ends this script, not the run. Exit status: 0 done, 1 failed, 2 bad
# flags or input, 3 the model does not fit.
#
# Environment: ELDER_POLL_SECONDS, seconds between checks of the pod's state; default: 30
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$repo/launch/common.sh"

dry_run=no delete=no failures_allowed=3 create_flags=()
project=${ELDER_PROJECT:-} zone=${ELDER_ZONE:-} name=${ELDER_NAME:-} type=${ELDER_ACCELERATOR_TYPE:-}
version=${ELDER_RUNTIME_VERSION:-} bucket=${ELDER_BUCKET:-} nfs=${ELDER_NFS:-} poll=${ELDER_POLL_SECONDS:-30}
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage && exit ;;
    --dry-run) dry_run=yes ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --accelerator-type=*) type=${1#*=} ;;
    --runtime-version=*) version=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --spot) create_flags+=(--spot) ;;
    --create-flag=*) create_flags+=("${1#*=}") ;;
    --max-failures=*) failures_allowed=${1#*=} ;;
    --delete) delete=yes ;;
    --) shift && break ;;
    *) refuse "'$1' is unknown: the flags of elder_jax come after --" ;;
  esac
  shift
done
[[ -n $project ]] || refuse '--project is missing: give the id of your project, or set ELDER_PROJECT'
[[ -n $zone ]] || refuse '--zone is missing: give a zone that has such TPUs, or set ELDER_ZONE'
[[ -n $name ]] || refuse '--name is missing: give the pod a name, or set ELDER_NAME'
[[ -n $type ]] || refuse '--accelerator-type is missing: give a type such as v5p-128, or set ELDER_ACCELERATOR_TYPE'
[[ -n $version ]] || refuse '--runtime-version is missing: give the image for this type of TPU, or set ELDER_RUNTIME_VERSION'
[[ -n $bucket$nfs ]] || refuse '--bucket and --nfs are missing: give one of them, or set ELDER_BUCKET or ELDER_NFS'
[[ -z $bucket || -z $nfs ]] || refuse '--bucket and --nfs are both given: give one of them'
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || refuse "--name=$name must have at most 40 characters of a-z, 0-9 and -, and start with a letter"
[[ -z $nfs || $nfs == ?*:/* ]] || refuse "--nfs=$nfs must be IP:/SHARE"
whole --max-failures "$failures_allowed"
shared_workdir /mnt/elder "$name" "$@"
need gcloud 'install the Google Cloud CLI'
storage=$nfs
[[ -z $bucket ]] || storage=gs://${bucket#gs://}

where=("--project=$project" "--zone=$zone")
resource=(gcloud compute tpus queued-resources)
# With this interval, ssh detects a lost host within two minutes.
on_all=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--ssh-flag=-o ServerAliveInterval=30")
scratch=/tmp/elder_jax
if [[ $dry_run == no ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi
trap 'say "a run in progress continues; rerun the same command to watch it, with --delete to delete the pod at the end"; exit 130' INT TERM

# Prints ACTIVE, SUSPENDED, …; ABSENT if there is no pod, UNKNOWN if gcloud fails.
state() {
  local answer
  if answer=$("${resource[@]}" describe "$name" "${where[@]}" '--format=value(state.state)' 2>"$scratch/error"); then
    echo "$answer"
  elif grep -qE 'NOT_FOUND|was not found' "$scratch/error"; then
    echo ABSENT
  else
    say "gcloud: $(tail -n 1 "$scratch/error")"
    echo UNKNOWN
  fi
}

create() {
  say "requesting $type in $zone as $name"
  act "${resource[@]}" create "$name" "--node-id=$name" "${where[@]}" "--accelerator-type=$type" \
    "--runtime-version=$version" "${create_flags[@]}" --quiet
}

delete() {
  say "deleting $name"
  act "${resource[@]}" delete "$name" "${where[@]}" --force --quiet
}

# Returns when the pod is ACTIVE.
ensure_pod() {
  local now before=''
  while now=$(state); [[ $now != ACTIVE ]]; do
    [[ $now == "$before" ]] || say "the pod is $now"
    before=$now
    case $now in
      ABSENT) create ;;
      SUSPENDED) delete ;; # preempted: its hosts are gone
      FAILED)
        failed "the queued resource $name failed"
        delete
        ;;
      UNKNOWN) failed 'the state of the pod cannot be read' ;;
    esac
    sleep "$poll"
  done
}

failures=0 # since the last checkpoint
failed() { # SENTENCE
  failures=$((failures + 1))
  ((failures < failures_allowed)) || finish 1 "$1; giving up after $failures_allowed failures, see above"
  say "$1; failure $failures of $failures_allowed, retrying"
}

finish() { # STATUS SENTENCE
  if [[ $delete == yes ]]; then delete; else say "the pod still exists and costs money; to delete it: ${resource[*]} delete $name ${where[*]} --force"; fi
  say "$2"
  exit "$1"
}

install() {
  say 'copying and installing elder_jax on all hosts'
  act tar -czf "$scratch/elder_jax.tar.gz" --exclude=__pycache__ -C "$repo" setup.py pyproject.toml README.md LICENSE \
    elder_jax configs launch &&
    act gcloud compute tpus tpu-vm scp "$scratch/elder_jax.tar.gz" "$name:" "${where[@]}" --worker=all --quiet &&
    act "${on_all[@]}" "--command=mkdir -p ~/elder/src && tar -xzf ~/elder_jax.tar.gz -C ~/elder/src && bash ~/elder/src/launch/tpu_host.sh setup ${storage@Q}" --quiet
}

run() { act "${on_all[@]}" "--command=bash ~/elder/src/launch/tpu_host.sh run ${elder_flags[*]@Q}" --quiet; }

if [[ $dry_run == yes ]]; then
  show "${resource[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
  echo '# if there is no pod:'
  create
  echo "# every $poll s until it is ACTIVE; a SUSPENDED pod is deleted and requested again. Then:"
  install
  run
  echo '# exit status 0, 2, 3: the end; 75 or a preempted pod: start over; any other: counts as a failure, start over'
  [[ $delete == no ]] || delete
  exit
fi

installed=no
while true; do
  ensure_pod
  if [[ $installed == no ]]; then
    install || { failed 'the hosts could not be set up' && sleep "$poll" && continue; }
    installed=yes
  fi
  status=0
  run || status=$?
  case $status in
    0) finish 0 'done' ;;
    2) finish 2 'bad flags or input; see above' ;;
    3) finish 3 'the model does not fit; see above' ;;
    75)
      failures=0
      say 'stopped, checkpoint written; resuming'
      ;;
  esac
  # A preempted pod changes its state soon, whatever the exit status was.
  sleep "$poll"
  now=$(state)
  if [[ $now == UNKNOWN ]]; then
    : # read again above
  elif [[ $now != ACTIVE ]]; then
    say 'the pod is gone; resuming on a new one'
    installed=no
  elif ((status == 255)); then
    installed=no # the connection was lost; if it stays so, the next set-up fails and is counted
  elif ((status != 75)); then
    failed "elder_jax ended with exit status $status"
  fi
done
