#!/usr/bin/env bash
# Runs elder_jax on a TPU slice of a GKE cluster that has JobSet (0.7 or newer): one pod on each host of the slice.
#
#   launch/gke_jobset.sh [--dry-run] [options] -- --flagfile=configs/X.flags [--flag=value ...]
#
#   --name=NAME              name of the JobSet
#   --namespace=NAME         default: default
#   --image=IMAGE            made with the Dockerfile, --build-arg EXTRA=tpu, where the cluster can pull it
#   --accelerator=TYPE       as GKE labels it: tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology=AxB[xC]       of the slice, in chips: 4x4, 4x4x4
#   --chips-per-host=N       chips of a host; default: 4
#   --pvc=NAME               the storage, at /mnt/elder in all pods: a ReadWriteMany claim (Filestore) ...
#   --bucket=NAME            ... or a bucket, by the Cloud Storage FUSE driver
#   --service-account=NAME   Kubernetes service account of the pods, with access to the bucket
#   --spot                   on spot nodes
#   --max-restarts=N         after failures and preemptions, which JobSet counts alike; default: 20
#   --grace=SECONDS          from SIGTERM to SIGKILL: enough for a checkpoint; default: 300
#
# A dry run prints the manifest and nothing else to standard output. --workdir is /mnt/elder/runs/NAME unless given. Exit
# status 2 (bad flags or input) and 3 (--plan says that it does not fit) of a pod end the JobSet, anything else but 0 restarts
# all pods, which go on from the last checkpoint.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry_run=no name='' namespace=default image='' accelerator='' topology='' chips=4 pvc='' bucket='' account='' spot=no
restarts=20 grace=300
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage && exit ;;
    --dry-run) dry_run=yes ;;
    --name=*) name=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips-per-host=*) chips=${1#*=} ;;
    --pvc=*) pvc=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --service-account=*) account=${1#*=} ;;
    --spot) spot=yes ;;
    --max-restarts=*) restarts=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --) shift && break ;;
    *) refuse "'$1' is unknown: the flags of elder_jax come after --" ;;
  esac
  shift
done
[[ -n $name ]] || refuse '--name is missing: give the JobSet a name'
[[ -n $image ]] || refuse '--image is missing: give the image that was made with the Dockerfile'
[[ -n $accelerator ]] || refuse '--accelerator is missing: give one as in tpu-v5p-slice'
[[ -n $topology ]] || refuse '--topology is missing: give that of the slice, as in 4x4x4'
[[ -n $pvc$bucket ]] || refuse '--pvc and --bucket are missing: give one of them'
[[ -z $pvc || -z $bucket ]] || refuse '--pvc and --bucket are both given: give one of them'
# JobSet makes names of pods of it, which may have 63 characters.
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || refuse "--name=$name must be of a-z, 0-9 and -, begin with a letter and have at most 40 characters"
[[ $topology =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] || refuse "--topology=$topology must be two or three sizes, as in 4x4 or 4x4x4"
whole --chips-per-host "$chips"
whole --max-restarts "$restarts"
whole --grace "$grace"
total=$((${topology//x/*}))
((total % chips == 0)) || refuse "--chips-per-host=$chips does not divide the $total chips of --topology=$topology"
hosts=$((total / chips))
shared_workdir /mnt/elder "$name" "$@"

for value in "$namespace" "$image" "$accelerator" "$pvc$bucket" "$account" "${elder_flags[@]}"; do
  [[ $value != *[[:cntrl:]]* ]] || refuse "${value@Q} has a line break or another control character"
done
need kubectl 'install it with: gcloud components install kubectl'

# A string as JSON writes it, which is YAML, too.
quote() { # STRING
  local s=${1//\\/\\\\}
  printf '"%s"' "${s//\"/\\\"}"
}

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(quote "$name")
  namespace: $(quote "$namespace")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool  # all pods on one slice, alone
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - name: retryingIsUseless
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: hosts
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0  # a pod cannot come back alone: the others have lost it
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: elder
              operator: In
              values: [2, 3]
        template:
YAML
  [[ -z $bucket ]] || cat <<YAML
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
YAML
  cat <<YAML
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $grace
YAML
  [[ -z $account ]] || echo "            serviceAccountName: $(quote "$account")"
  cat <<YAML
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(quote "$accelerator")
              cloud.google.com/gke-tpu-topology: $(quote "$topology")
YAML
  [[ $spot == no ]] || cat <<YAML
              cloud.google.com/gke-spot: "true"
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: "true"
              effect: NoSchedule
YAML
  cat <<YAML
            securityContext:
              runAsUser: 0  # a capability is of use to root only
            containers:
            - name: elder
              image: $(quote "$image")
              # The driver of the TPU locks memory. exec: SIGTERM must reach elder_jax.
              command: [bash, -c, 'ulimit -l 68719476736; exec python -m elder_jax.main "\$@"', elder]
              args:
YAML
  # Kubernetes would replace $(NAME) by a variable's value, but not $$(NAME).
  for flag in "${elder_flags[@]}"; do echo "              - $(quote "${flag//\$(/\$\$(}")"; done
  cat <<YAML
              env:
              - name: JAX_COMPILATION_CACHE_DIR  # a restart need not compile again
                value: /mnt/elder/jax_cache
              securityContext:
                capabilities:
                  add: [SYS_RESOURCE]
              resources:
                limits:
                  google.com/tpu: $chips
              volumeMounts:
              - name: storage
                mountPath: /mnt/elder
            volumes:
            - name: storage
YAML
  if [[ -n $pvc ]]; then
    cat <<YAML
              persistentVolumeClaim:
                claimName: $(quote "$pvc")
YAML
  else
    # Pods read what others have just written, so nothing is remembered; finished folders get their name by a rename.
    cat <<YAML
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: $(quote "${bucket#gs://}")
                  mountOptions: implicit-dirs,metadata-cache:ttl-secs:0,file-system:rename-dir-limit:200000
YAML
  fi
}

if [[ $dry_run == yes ]]; then
  echo "# $hosts pods of $chips chips. What is given to: kubectl create -f -"
  manifest
else
  manifest | kubectl create -f -
  say "to watch: kubectl --namespace=$namespace logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
fi
