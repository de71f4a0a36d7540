#!/usr/bin/env bash
# Runs elder_jax on a TPU VM pod: asks for the pod as a queued resource, waits, mounts the shared storage, installs, runs on all
# hosts, and goes on after preemption with a new pod. Started again, it finds what is there and goes on, or watches.
#
#   launch/tpu_pod.sh [--dry-run] [options] -- --flagfile=configs/X.flags [--flag=value ...]
#
#   --project=ID             ELDER_PROJECT           project of Google Cloud
#   --zone=ZONE              ELDER_ZONE              zone of the pod, and better of the storage, too
#   --name=NAME              ELDER_NAME              name of the pod and of its queued resource
#   --accelerator-type=TYPE  ELDER_ACCELERATOR_TYPE  as in v5litepod-16, v5p-128, v6e-16
#   --runtime-version=V      ELDER_RUNTIME_VERSION   of the machine image: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p,
#                                                    v2-alpha-tpuv6e for v6e, tpu-ubuntu2204-base for v4
#   --bucket=NAME            ELDER_BUCKET            the storage, at /mnt/elder on all hosts: a bucket ...
#   --nfs=IP:/SHARE          ELDER_NFS               ... or a share of Filestore or of another NFS server
#   --spot                                           cheaper, can be preempted
#   --create-flag=FLAG                               one more flag for the queued resource, as in --create-flag=--reserved;
#                                                    repeatable
#   --max-failures=N                                 failures, other than preemptions, before it gives up; default: 3
#   --delete                                         deletes the pod at the end, whatever the end is
#
# --workdir is /mnt/elder/runs/NAME unless given. Ctrl-C ends this script, not the run. Exit status: 0 done, 1 failed, 2 bad
# flags or input, 3 --plan says that it does not fit.
#
# Environment: ELDER_POLL_SECONDS, between looks at the state of the pod; default: 30
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
[[ -n $project ]] || refuse '--project is missing: give the id of your project, or ELDER_PROJECT'
[[ -n $zone ]] || refuse '--zone is missing: give a zone that has such TPUs, or ELDER_ZONE'
[[ -n $name ]] || refuse '--name is missing: give the pod a name, or ELDER_NAME'
[[ -n $type ]] || refuse '--accelerator-type is missing: give one as in v5p-128, or ELDER_ACCELERATOR_TYPE'
[[ -n $version ]] || refuse '--runtime-version is missing: give the image for this kind of TPU, or ELDER_RUNTIME_VERSION'
[[ -n $bucket$nfs ]] || refuse '--bucket and --nfs are missing: give one of them, or ELDER_BUCKET or ELDER_NFS'
[[ -z $bucket || -z $nfs ]] || refuse '--bucket and --nfs are both given: give one of them'
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || refuse "--name=$name must be of a-z, 0-9 and -, begin with a letter and have at most 40 characters"
[[ -z $nfs || $nfs == ?*:/* ]] || refuse "--nfs=$nfs must be IP:/SHARE"
whole --max-failures "$failures_allowed"
shared_workdir /mnt/elder "$name" "$@"
need gcloud 'install the Google Cloud CLI'
storage=$nfs
[[ -z $bucket ]] || storage=gs://${bucket#gs://}

where=("--project=$project" "--zone=$zone")
resource=(gcloud compute tpus queued-resources)
# ssh notices within two minutes that a host has vanished.
on_all=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--ssh-flag=-o ServerAliveInterval=30")
scratch=/tmp/elder_jax
if [[ $dry_run == no ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi
trap 'say "the run goes on if it was going: start the same command again to watch it, with --delete to delete the pod at the end"; exit 130' INT TERM

# ACTIVE, SUSPENDED, …; ABSENT where there is none, UNKNOWN where gcloud cannot tell.
state() {
  local answer
  if answer=$("${resource[@]}" describe "$name" "${where[@]}" '--format=value(state.state)' 2>"$scratch/error"); then
    echo "$answer"
  elif grep -qE 'NOT_FOUND|was not found' "$scratch/error"; then
    echo ABSENT
  else
    say "gcloud says: $(tail -n 1 "$scratch/error")"
    echo UNKNOWN
  fi
}

create() {
  say "asking for $type in $zone as $name"
  act "${resource[@]}" create "$name" "--node-id=$name" "${where[@]}" "--accelerator-type=$type" \
    "--runtime-version=$version" "${create_flags[@]}" --quiet
}

delete() {
  say "deleting $name"
  act "${resource[@]}" delete "$name" "${where[@]}" --force --quiet
}

# Returns when the pod is there.
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
      UNKNOWN) failed 'the state of the pod cannot be had' ;;
    esac
    sleep "$poll"
  done
}

failures=0 # since the last checkpoint
failed() { # SENTENCE
  failures=$((failures + 1))
  ((failures < failures_allowed)) || finish 1 "$1, the last of $failures_allowed failures; see above"
  say "$1; failure $failures of $failures_allowed, trying again"
}

finish() { # STATUS SENTENCE
  if [[ $delete == yes ]]; then delete; else say "the pod is still there, and paid for; to delete it: ${resource[*]} delete $name ${where[*]} --force"; fi
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
  echo '# if there is none:'
  create
  echo "# every $poll s until it is ACTIVE; SUSPENDED, it is deleted and asked for again. Then:"
  install
  run
  echo '# 0, 2 and 3 are the end; 75 and a pod that was preempted: all of this again; otherwise again after a failure'
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
    3) finish 3 'the plan says that it does not fit; see above' ;;
    75)
      failures=0
      say 'stopped with a checkpoint written; going on'
      ;;
  esac
  # A pod that was preempted has another state soon, whatever the run's last words were.
  sleep "$poll"
  now=$(state)
  if [[ $now == UNKNOWN ]]; then
    : # asked again above
  elif [[ $now != ACTIVE ]]; then
    say 'the pod is gone; the run goes on in a new one'
    installed=no
  elif ((status == 255)); then
    installed=no # the connection was lost: set-up fails, and is counted, if it cannot be had again
  elif ((status != 75)); then
    failed "elder_jax ended with exit status $status"
  fi
done
