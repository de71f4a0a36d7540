#!/usr/bin/env bash
# Runs elder_jax on a TPU slice of a GKE cluster with JobSet 0.7 or newer: one pod on each host of the slice.
#
#   launch/gke_jobset.sh [--dry-run] [options] -- --flagfile=configs/X.flags [--flag=value ...]
#
#   --name=NAME              name of the JobSet
#   --namespace=NAME         default: default
#   --image=IMAGE            image built from the Dockerfile with --build-arg EXTRA=tpu, in a registry of the cluster
#   --accelerator=TYPE       GKE's label: tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology=AxB[xC]       topology of the slice, in chips: 4x4, 4x4x4
#   --chips-per-host=N       default: 4
#   --pvc=NAME               storage at /mnt/elder in all pods: a ReadWriteMany claim (Filestore) ...
#   --bucket=NAME            ... or a bucket, mounted by the Cloud Storage FUSE driver
#   --service-account=NAME   Kubernetes service account of the pods, with access to the bucket
#   --spot                   use spot nodes
#   --max-restarts=N         restarts after failures and preemptions together; default: 20
#   --grace=SECONDS          from SIGTERM to SIGKILL, enough to write a checkpoint; default: 300
#
# A dry run prints the manifest, and nothing else, to standard output. The default --workdir is /mnt/elder/runs/NAME.
#
# If a pod exits with 2 (bad flags or input) or 3 (the model does not fit), the JobSet ends. After any other status except 0,
# all pods restart and resume from the last checkpoint.
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
[[ -n $image ]] || refuse '--image is missing: give the image built from the Dockerfile'
[[ -n $accelerator ]] || refuse '--accelerator is missing: give the label of GKE, such as tpu-v5p-slice'
[[ -n $topology ]] || refuse '--topology is missing: give the topology of the slice, such as 4x4x4'
[[ -n $pvc$bucket ]] || refuse '--pvc and --bucket are missing: give one of them'
[[ -z $pvc || -z $bucket ]] || refuse '--pvc and --bucket are both given: give one of them'
# JobSet derives the names of pods from it, which have at most 63 characters.
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || refuse "--name=$name must have at most 40 characters of a-z, 0-9 and -, and start with a letter"
[[ $topology =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] || refuse "--topology=$topology must be two or three sizes, such as 4x4 or 4x4x4"
whole --chips-per-host "$chips"
whole --max-restarts "$restarts"
whole --grace "$grace"
total=$((${topology//x/*}))
((total % chips == 0)) || refuse "--chips-per-host=$chips does not divide the $total chips of --topology=$topology: correct one of them"
hosts=$((total / chips))
shared_workdir /mnt/elder "$name" "$@"

for value in "$namespace" "$image" "$accelerator" "$pvc$bucket" "$account" "${elder_flags[@]}"; do
  [[ $value != *[[:cntrl:]]* ]] || refuse "${value@Q} has a line break or another control character: remove it"
done
need kubectl 'install it with: gcloud components install kubectl'

# Quotes a string as in JSON, which is also valid YAML.
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
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool  # all pods on one slice, without others
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
        backoffLimit: 0  # a pod cannot restart alone: the others lost their connection to it
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
              runAsUser: 0  # only root can use the capability
            containers:
            - name: elder
              image: $(quote "$image")
              # The TPU driver locks memory. exec, so that SIGTERM reaches elder_jax.
              command: [bash, -c, 'ulimit -l 68719476736; exec python -m elder_jax.main "\$@"', elder]
              args:
YAML
  # Kubernetes replaces $(NAME) by the value of a variable, but keeps $$(NAME) as $(NAME).
  for flag in "${elder_flags[@]}"; do echo "              - $(quote "${flag//\$(/\$\$(}")"; done
  cat <<YAML
              env:
              - name: JAX_COMPILATION_CACHE_DIR  # so that a restart does not compile again
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
    # No metadata cache: pods read what others have just written. Finished folders are renamed into place.
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
  echo "# $hosts pods of $chips chips. Input of: kubectl create -f -"
  manifest
else
  manifest | kubectl create -f -
  say "to watch: kubectl --namespace=$namespace logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
fi
