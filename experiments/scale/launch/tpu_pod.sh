#!/bin/bash
# A run over all hosts of a Cloud TPU slice:
#   NAME=my-v5p-64 ZONE=us-east5-a ./tpu_pod.sh mini gs-mount/runs/mini --mesh data=4,expert=8
# The words are those of `dsv3 train`: the preset, the run's folder, then any options. The package must be installed on
# every host (the same ssh command with `pip install dsv3-jax 'jax[tpu]'`), and the folder be one that all hosts share.
# The same command again goes on from the last checkpoint, also on a slice of another size with its own --mesh.
set -euo pipefail
: "${NAME:?name of the TPU slice}" "${ZONE:?its zone}"
preset=$1 out=$2
shift 2

# %q: each host's shell reads the line anew, and must find the same words.
printf -v line '%q ' dsv3 train "$preset" --out "$out" --cluster auto --cluster-timeout 300 "$@"
# --worker=all: every host runs the same command; JAX learns from the slice who is who.
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$line"
