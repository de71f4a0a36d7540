# shellcheck shell=bash
# What the launch scripts share; sourced by them.

me="launch/$(basename "$0")"
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "$me: bash $BASH_VERSION is too old; install bash 4.4 or newer." >&2
  exit 2
fi

# One sentence and an exit status, as elder_jax itself ends.
fail() { # STATUS SENTENCE
  printf '%s: %s\n' "$me" "$2" >&2
  exit "$1"
}

say() { printf '%s: %s\n' "$me" "$*" >&2; }

# Bad arguments: the sentence points to the help.
refuse() { fail 2 "$* (see $me --help)"; }

# The comment at the top of the script.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# A command as it could be typed, flags with spaces, commas and quotes included.
show() {
  local word line='+'
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "$line"
}

# Runs a command, or only shows it in a dry run.
act() {
  if [[ ${dry_run:?} == yes ]]; then show "$@"; else "$@"; fi
}

need() { # PROGRAM WHERE TO GET IT
  [[ $dry_run == yes ]] || command -v "$1" >/dev/null || fail 2 "$1 is not installed; $2."
}

whole() { # FLAG VALUE: a whole number of at least 1
  [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || refuse "$1=$2 is not a whole number of at least 1"
}

# All hosts must share the workdir: flags without one get MOUNT/runs/NAME, one outside of MOUNT is refused. Leaves all flags
# in the array elder_flags.
shared_workdir() { # MOUNT NAME FLAGS…
  local mount=$1 name=$2 flag workdir=''
  elder_flags=("${@:3}")
  [[ $# -gt 2 ]] || refuse 'the flags of elder_jax are missing: give them after --, as in -- --flagfile=configs/llama7b.flags'
  for flag in "${elder_flags[@]}"; do
    case $flag in
      --workdir=* | -workdir=*) workdir=${flag#*=} ;;
      --workdir | -workdir) refuse 'write --workdir=FOLDER in one word' ;;
      --*=* | --*) ;;
      *) refuse "'$flag' is no flag of elder_jax: write --name=value in one word" ;;
    esac
  done
  if [[ -z $workdir ]]; then
    elder_flags+=("--workdir=$mount/runs/$name")
  elif [[ $workdir != "$mount"/?* ]]; then
    refuse "--workdir=$workdir is not on the storage that all hosts share: give one under $mount"
  fi
}
