#!/usr/bin/env bash
# Runs N processes of elder_jax on this machine. They connect through a free port, like the hosts of a cluster.
#
#   launch/local.sh [--dry-run] N --flagfile=configs/X.flags [--flag=value ...]
#
# Prints the output of process 0; the output of process I goes to LOGS/I.log. Forwards Ctrl-C and SIGTERM to all processes
# as SIGTERM: they write a checkpoint and exit with 75. If one process fails, the others are terminated. The exit status is
# that of the first process that failed (1 if a signal killed it), else 0.
#
# Environment:
#   PYTHON               the interpreter; default: python
#   JAX_PLATFORMS        default: cpu
#   DEVICES_PER_PROCESS  simulated CPU devices of each process; unset: one
#   LOGS                 folder of the logs; default: a new temporary folder
#   GRACE                seconds to write a checkpoint before processes are killed; default: 120
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
[[ $1 =~ ^[1-9][0-9]{0,2}$ ]] || refuse "'$1' is not a number of processes: give 1 to 999, then the flags of elder_jax"
n=$1
shift
python=${PYTHON:-python}
grace=${GRACE:-120}
whole GRACE "$grace"
command -v "$python" >/dev/null || fail 2 "PYTHON=$python is not installed; give another interpreter."
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export JAX_CPU_COLLECTIVES_IMPLEMENTATION=${JAX_CPU_COLLECTIVES_IMPLEMENTATION:-gloo}
if [[ -n ${DEVICES_PER_PROCESS:-} ]]; then
  whole DEVICES_PER_PROCESS "$DEVICES_PER_PROCESS"
  export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES_PER_PROCESS"
fi

# An unused port below the range of outgoing connections.
port=0
for _ in {1..50}; do
  port=$((20000 + RANDOM % 12000))
  (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
done

command_of() { # PROCESS FLAGS…: sets the array cmd to the command
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

running=() # process ids of running processes, by number
status=0   # of the first process that failed
deadline='' # in SECONDS; processes that still run then are killed

# A second call can only make the deadline earlier.
terminate() { # SECONDS UNTIL SIGKILL
  local pid end=$((SECONDS + 1 + $1)) # SECONDS is rounded down
  for pid in "${running[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  if [[ -z $deadline ]] || ((end < deadline)); then deadline=$end; fi
}

trap 'terminate "$grace"' TERM INT HUP
for ((i = 0; i < n; i++)); do
  [[ -z $deadline ]] || break # a signal has arrived already
  command_of "$i" "$@"
  # In bash, commands in the background ignore Ctrl-C, so only `terminate` reaches them.
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
    # After 75, the others need time to complete the checkpoint. After a failure, they would wait for the dead process.
    if ((status == 75)); then terminate "$grace"; else terminate 10; fi
  done
  if [[ -n $deadline ]] && ((SECONDS >= deadline)); then
    for pid in "${running[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  fi
  ((${#running[@]} == 0)) || sleep 0.2 || true # Ctrl-C also ends the sleep
done
exit "$status"
