#!/usr/bin/env bash
# Runs N real processes of elder_jax on this machine. They find one another at a free port, as hosts of a cluster would.
#
#   launch/local.sh [--dry-run] N --flagfile=configs/X.flags [--flag=value ...]
#
# The output of process 0 is shown, that of process I goes to LOGS/I.log. Ctrl-C and SIGTERM reach all processes as SIGTERM:
# they write a checkpoint and leave with 75. When one fails the others are ended. Exit status: that of the process that
# failed first (1 where a signal ended it), else 0.
#
# Environment:
#   PYTHON               the interpreter; default: python
#   JAX_PLATFORMS        default: cpu
#   DEVICES_PER_PROCESS  simulated CPU devices of each process; unset: one
#   LOGS                 folder of the logs; default: a new one in the folder for temporary files
#   GRACE                seconds that processes have for a checkpoint before they are killed; default: 120
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry_run=no
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage && exit ;;
    --dry-run) dry_run=yes ;;
    *) break ;;
  esac
  shift
done
[[ $# -gt 0 ]] || refuse 'the number of processes is missing: give it first, as in launch/local.sh 2 --flagfile=configs/smollm2_135m_demo.flags'
[[ $1 =~ ^[1-9][0-9]{0,2}$ ]] || refuse "'$1' is not a number of processes: give 1 to 999 first, then the flags of elder_jax"
n=$1
shift
python=${PYTHON:-python}
grace=${GRACE:-120}
whole GRACE "$grace"
command -v "$python" >/dev/null || fail 2 "PYTHON=$python is not installed; name another interpreter."
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export JAX_CPU_COLLECTIVES_IMPLEMENTATION=${JAX_CPU_COLLECTIVES_IMPLEMENTATION:-gloo}
if [[ -n ${DEVICES_PER_PROCESS:-} ]]; then
  whole DEVICES_PER_PROCESS "$DEVICES_PER_PROCESS"
  export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES_PER_PROCESS"
fi

# A port below those that systems give to outgoing connections, at which nobody answers.
port=0
for _ in {1..50}; do
  port=$((20000 + RANDOM % 12000))
  (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
done

command_of() { # PROCESS FLAGS…: leaves the command in the array cmd
  cmd=("$python" -m elder_jax.main "--coordinator=127.0.0.1:$port" "--num_processes=$n" "--process_id=$1" "${@:2}")
}

if [[ $dry_run == yes ]]; then
  for ((i = 0; i < n; i++)); do
    command_of "$i" "$@"
    show env "JAX_PLATFORMS=$JAX_PLATFORMS" "JAX_CPU_COLLECTIVES_IMPLEMENTATION=$JAX_CPU_COLLECTIVES_IMPLEMENTATION" \
      ${XLA_FLAGS:+"XLA_FLAGS=$XLA_FLAGS"} "${cmd[@]}"
  done
  exit
fi

logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
((n == 1)) || say "logs of the other processes: $logs"

running=() # process id of each that still runs, by its number
status=0   # of the process that failed first
deadline='' # in SECONDS: what runs then is killed

# A second one changes nothing but the deadline, and that only to an earlier time.
terminate() { # SECONDS UNTIL SIGKILL
  local pid end=$((SECONDS + 1 + $1)) # SECONDS is rounded down
  for pid in "${running[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  if [[ -z $deadline ]] || ((end < deadline)); then deadline=$end; fi
}

trap 'terminate "$grace"' TERM INT HUP
for ((i = 0; i < n; i++)); do
  [[ -z $deadline ]] || break # stopped already
  command_of "$i" "$@"
  # bash lets commands in the background ignore Ctrl-C: they hear of it from us alone.
  if ((i == 0)); then "${cmd[@]}" & else "${cmd[@]}" >"$logs/$i.log" 2>&1 & fi
  running[i]=$!
done

while ((${#running[@]})); do
  for i in "${!running[@]}"; do
    pid=${running[i]}
    ! kill -0 "$pid" 2>/dev/null || continue
    unset "running[$i]"
    code=0
    wait "$pid" || code=$?
    ((code != 0 && status == 0)) || continue
    say "process $i ended with exit status $code"
    ((i == 0)) || tail -n 20 "$logs/$i.log" >&2
    status=$((code < 128 ? code : 1))
    # Those that are writing the same checkpoint shall end it; after a failure the others would wait for the dead one.
    if ((status == 75)); then terminate "$grace"; else terminate 10; fi
  done
  if [[ -n $deadline ]] && ((SECONDS >= deadline)); then
    for pid in "${running[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  fi
  ((${#running[@]} == 0)) || sleep 0.2 || true # Ctrl-C ends the sleep, too
done
exit "$status"
