# shellcheck shell=bash
# Functions shared by the launch scripts, which source this file.

me="launch/$(basename "$0")"
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "$me: bash $BASH_VERSION is too old; install bash 4.4 or newer." >&2
  exit 2
fi

# Prints one sentence and exits, like elder_jax itself.
fail() { # STATUS SENTENCE
  printf '%s: %s\n' "$me" "$2" >&2
  exit "$1"
}

say() { printf '%s: %s\n' "$me" "$*" >&2; }

# For bad arguments: the sentence refers to the help.
refuse() { fail 2 "$* (see $me --help)"; }

# Prints the comment at the top of the script.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# Prints a command as one would type it, with spaces and quotes in flags escaped.
show() {
  local word line='+'
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "$line"
}

# Runs a command; in a dry run only prints it.
act() {
  if [[ ${dry_run:?} == yes ]]; then show "$@"; else "$@"; fi
}

need() { # PROGRAM WHERE TO GET IT
  [[ $dry_run == yes ]] || command -v "$1" >/dev/null || fail 2 "$1 is not installed; $2."
}

whole() { # FLAG VALUE: refuses all but a whole number from 1 to 999999
  [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || refuse "$1=$2 is not a whole number from 1 to 999999: give one"
}

# All hosts must share the workdir. Adds --workdir=MOUNT/runs/NAME if the flags have none, and refuses one outside MOUNT.
# Sets the array elder_flags to all flags.
shared_workdir() { # MOUNT NAME FLAGS…
  local mount=$1 name=$2 flag workdir=''
  elder_flags=("${@:3}")
  [[ $# -gt 2 ]] || refuse 'the flags of elder_jax are missing: give them after --, as in -- --flagfile=configs/llama7b.flags'
  for flag in "${elder_flags[@]}"; do
    case $flag in
      --workdir=* | -workdir=*) workdir=${flag#*=} ;;
      --workdir | -workdir) refuse 'write --workdir=FOLDER in one word' ;;
      --*=* | --*) ;;
      *) refuse "'$flag' is not a flag of elder_jax: write --name=value in one word" ;;
    esac
  done
  if [[ -z $workdir ]]; then
    elder_flags+=("--workdir=$mount/runs/$name")
  elif [[ $workdir != "$mount"/?* ]]; then
    refuse "--workdir=$workdir is not on the storage that all hosts share: give one under $mount"
  fi
}
