#!/usr/bin/env bash
# A job on a TPU VM, from asking for the TPU to the last picture:
#
#   launch/cluster/tpu_vm.sh run --name NAME --zone ZONE [options] -- ARGUMENTS OF launch.generate
#   launch/cluster/tpu_vm.sh delete --name NAME --zone ZONE [--project PROJECT]
#
#   launch/cluster/tpu_vm.sh run --name fog --zone us-west4-a --copy prompts.csv -- \
#     --prompts_file prompts.csv --out gs://BUCKET/out --elastic
#
# Asks for a spot TPU by gcloud's queued resources, waits until it is there, installs fogsculpt on every host
# of it and runs the job on all of them. Each finds its part by itself; with --elastic they share the work as
# it comes. When the TPU is preempted, another one is asked for and the job goes on. When this script was
# stopped, the same command goes on. The TPU stays, and costs, until `delete`.
#
#   --name NAME               of the request and of the TPU VM
#   --zone ZONE               where
#   --project PROJECT         without it gcloud's default
#   --accelerator-type TYPE   (default v5litepod-8)
#   --runtime-version NAME    (default v2-alpha-tpuv5-lite)
#   --on-demand               not a spot TPU, but one that is not preempted
#   --create-flag FLAG        one more of `gcloud compute tpus queued-resources create`; as often as you like
#   --copy FILE               or folder, to where the job runs, on every host; as often as you like
#
# Exit code: that of the job (0 all drawn, 1 some rows could not be drawn); 2 a mistake in the options;
# 3 there is no TPU to be had; gcloud's own where it fails.
set -euo pipefail

POLL=${FOGSCULPT_POLL:-30} # seconds between looks at the request

main() {
  local command=${1:-} name='' zone='' type=v5litepod-8 runtime=v2-alpha-tpuv5-lite tier=--spot
  local where=() create_flags=() files=() # ${files[@]+...} below: empty ones are unset to an old bash
  case $command in
    run | delete) shift ;;
    --help | -h | '') help && exit ;;
    *) mistake "$command is unknown; write run, delete or --help" ;;
  esac
  while [ $# -gt 0 ]; do
    case $1 in
      --) shift && break ;;
      --help | -h) help && exit ;;
      --on-demand) tier='' && shift && continue ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    [ $# -ge 2 ] || mistake "write a value after $1"
    case $1 in
      --name) name=$2 ;;
      --zone) zone=$2 ;;
      --project) where+=("--project=$2") ;;
      --accelerator-type) type=$2 ;;
      --runtime-version) runtime=$2 ;;
      --create-flag) create_flags+=("$2") ;;
      --copy) files+=("$2") ;;
      *) mistake "$1 is unknown; --help lists the options, and -- goes before the arguments of the job" ;;
    esac
    shift 2
  done
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || mistake "--name '$name': write small letters, digits and -"
  [ -n "$zone" ] || mistake "write --zone ZONE, such as us-west4-a"
  where+=("--zone=$zone")
  command -v gcloud >/dev/null || mistake "there is no gcloud; install the Google Cloud CLI"

  if [ "$command" = delete ]; then
    give_back
  else
    check_job "$@"
    run "$@"
  fi
}

help() { # the head of this file
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
}

tell() {
  echo "tpu_vm: $*" >&2
}

mistake() {
  echo "error: $*" >&2
  exit 2
}

check_job() {
  local file
  for file in ${files[@]+"${files[@]}"}; do
    [ -e "$file" ] || mistake "--copy $file: there is no such file"
  done
  [[ " $* " =~ ' --prompts_file'[=\ ] ]] || mistake "write -- --prompts_file FILE and the rest of the job"
  [[ " $* " =~ ' --out'[=\ ](gs|s3):// ]] ||
    mistake "write --out gs://BUCKET/FOLDER: the disk of a TPU VM goes when it is preempted"
}

run() {
  local code
  while true; do
    wait_for_tpu
    code=0
    work "$@" || code=$?
    [ "$code" != 0 ] || break
    # 143: the job was stopped with more to do, as happens a moment before the TPU is seen to be gone.
    [ "$code" = 143 ] || [ "$(request_state) $(vm_state)" != "ACTIVE READY" ] || break
    tell "the TPU $name was lost; what was drawn stays, and the job goes on"
    sleep "$POLL"
  done
  case $code in
    0) tell "all done" ;;
    255) tell "no connection to $name; the same command goes on" ;;
    *) tell "ended with exit code $code" ;;
  esac
  tell "the TPU is there until: $0 delete --name $name ${where[*]}"
  exit "$code"
}

wait_for_tpu() { # asks for it if need be
  local state='' before=unknown
  while true; do
    state=$(request_state)
    if [ "$state" = ACTIVE ]; then
      state=$(vm_state)
      [ "$state" != READY ] || break
      state="ACTIVE ${state:-without a TPU VM}"
    fi
    [ "$state" = "$before" ] || tell "$name: ${state:-asking for $type in $zone}"
    before=$state
    case $state in
      '')
        gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
          --accelerator-type="$type" --runtime-version="$runtime" ${tier:+"$tier"} \
          ${create_flags[@]+"${create_flags[@]}"} --quiet
        ;;
      SUSPENDED | 'ACTIVE PREEMPTED' | 'ACTIVE TERMINATED')
        tell "$name is preempted: giving back what is left, to ask for another"
        give_back
        continue
        ;;
      FAILED)
        tell "the request for $name has FAILED; this says why:" \
          "gcloud compute tpus queued-resources describe $name ${where[*]}"
        tell "and this makes room for another: $0 delete --name $name ${where[*]}"
        exit 3
        ;;
    esac
    sleep "$POLL"
  done
  tell "$name: ACTIVE"
}

request_state() { # '' where there is no request
  gcloud compute tpus queued-resources list "${where[@]}" --format='value(name.basename(),state.state)' |
    awk -v name="$name" '$1 == name { print $2 }'
}

vm_state() { # '' where there is no such TPU VM
  gcloud compute tpus tpu-vm list "${where[@]}" --format='value(name.basename(),state)' |
    awk -v name="$name" '$1 == name { print $2 }'
}

give_back() {
  gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

work() { # the job, on every host; for the sake of `||` every step says what happens when it fails
  tell "installing fogsculpt"
  pack && copy && on_every_host "$INSTALL" || return
  tell "drawing"
  on_every_host "$DRAW$(printf ' %q' "$@")"
}

pack() {
  local root
  root=$(cd "$(dirname "$0")/../.." && pwd)
  tar -C "$root" --exclude=__pycache__ -cf "$PACKED/fogsculpt.tar" \
    setup.py pyproject.toml README.md engine launch configs
}

copy() {
  gcloud compute tpus tpu-vm scp "$PACKED/fogsculpt.tar" ${files[@]+"${files[@]}"} "$name:" \
    "${where[@]}" --worker=all --recurse --quiet
}

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet --command="$1"
}

# What the hosts run, in the home folder.
INSTALL=$(
  cat <<'END'
set -e
rm -rf fogsculpt
mkdir fogsculpt
tar -xf fogsculpt.tar -C fogsculpt
python3 -m pip install --quiet --user uv # for a newer Python than the one of the TPU VM
PATH=~/.local/bin:$PATH
uv venv --quiet --allow-existing --python 3.12 fogsculpt-venv
uv pip install --quiet --python fogsculpt-venv --reinstall-package fogsculpt "./fogsculpt[tpu,jobs,quantize]"
END
)
DRAW=$(
  cat <<'END'
# A worker that outlived its connection would hold the TPU: it is stopped first.
while grep -qs launch.generate "/proc/$(cat fogsculpt.pid)/cmdline"; do
  kill "$(cat fogsculpt.pid)"
  sleep 1
done 2>/dev/null
echo $$ >fogsculpt.pid
exec fogsculpt-venv/bin/python -u -m launch.generate
END
)

PACKED=$(mktemp -d)
trap 'rm -rf "$PACKED"' EXIT
main "$@"
