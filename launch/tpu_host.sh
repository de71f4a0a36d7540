#!/usr/bin/env bash
# launch/tpu_pod.sh calls this script on each host of a TPU VM pod. Both verbs can be called again at any time.
#
#   tpu_host.sh setup gs://BUCKET | IP:/SHARE   mounts the storage at /mnt/elder and installs elder_jax
#   tpu_host.sh run --flag=value ...            runs elder_jax so that it survives this connection, prints its output on
#                                               worker 0, and exits with its status; during a run, it only watches
set -euo pipefail
mount=/mnt/elder
home=~/elder
run=$home/run

setup() { # STORAGE
  local wait_for_lock=(-o DPkg::Lock::Timeout=900) # a new machine first updates itself
  if ! mountpoint -q "$mount"; then
    sudo mkdir -p "$mount"
    if [[ $1 == gs://* ]]; then
      if ! command -v gcsfuse >/dev/null; then
        local key=/usr/share/keyrings/cloud.google.asc repository
        repository="https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main"
        curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] $repository" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        sudo apt-get -qq "${wait_for_lock[@]}" update
        sudo apt-get -qq "${wait_for_lock[@]}" install -y gcsfuse
      fi
      sudo chown "$(id -u):$(id -g)" "$mount"
      # No metadata cache: hosts read what others have just written. Finished folders are renamed into place.
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=200000 "${1#gs://}" "$mount"
    else
      sudo apt-get -qq "${wait_for_lock[@]}" update
      sudo apt-get -qq "${wait_for_lock[@]}" install -y nfs-common
      # Attributes are cached for at most a second, for the same reason. noac would make every write synchronous.
      sudo mount -t nfs -o hard,actimeo=1,lookupcache=positive "$1" "$mount"
      [[ -w $mount ]] || sudo chmod 1777 "$mount" # root owns a new share
    fi
  fi
  # The Python of the image can be older than 3.11.
  if [[ ! -e $home/venv/installed ]] || ! cmp -s "$home/src/setup.py" "$home/venv/installed"; then
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv
    ~/.local/bin/uv venv -q --clear --python 3.12 "$home/venv"
    ~/.local/bin/uv pip install -q --python "$home/venv/bin/python" -e "$home/src[tpu,data,gguf,report]"
    cp "$home/src/setup.py" "$home/venv/installed"
  fi
}

is_running() {
  [[ -e $run/pid ]] && grep -qs elder_jax.main "/proc/$(<"$run/pid")/cmdline"
}

run() { # FLAGS…
  mkdir -p "$run"
  if is_running; then
    if [[ ${*@Q} != "$(<"$run/flags")" ]]; then
      echo "launch/tpu_host.sh: another run is in progress on this host: $(<"$run/flags")" >&2
      exit 2
    fi
  else
    rm -f "$run/status" "$run/pid"
    printf '%s\n' "${*@Q}" >"$run/flags"
    cd "$home/src"
    # A new session, so that the run survives this connection. The cache saves a new pod from compiling again.
    # shellcheck disable=SC2016
    JAX_COMPILATION_CACHE_DIR=$mount/jax_cache setsid --fork bash -c '
      "$2" -m elder_jax.main "${@:3}" &
      echo $! >"$1/pid"
      wait $!
      echo $? >"$1/status"
    ' elder "$run" "$home/venv/bin/python" "$@" </dev/null >>"$run/log" 2>&1
    until [[ -e $run/status ]] || is_running; do sleep 1; done
  fi
  local worker
  worker=$(curl -fsS -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
  if [[ $worker == 0 ]]; then
    tail -n 50 -F --pid="$(<"$run/pid")" "$run/log"
  else
    while is_running; do sleep 5; done
  fi
  for _ in {1..10}; do [[ -e $run/status ]] || sleep 1; done
  [[ -e $run/status ]] || exit 1 # the shell that writes the status was killed too
  exit "$(<"$run/status")"
}

case ${1:-} in
  setup | run) "$@" ;;
  *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
