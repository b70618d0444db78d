#!/bin/bash
# A run over all hosts of a Cloud TPU slice:
#   NAME=my-v5p-64 ZONE=us-east5-a ./tpu_pod.sh mini /mnt/filestore/runs/mini --mesh data=4,expert=8
# The arguments are those of `dsv3 train`: the preset, the run folder, then any options. Install the package on every
# host first (the same ssh command with `pip install dsv3-jax 'jax[tpu]'`). All hosts must share the run folder.
# The same command resumes from the last checkpoint, also on a slice of another size with its own --mesh.
set -euo pipefail
: "${NAME:?name of the TPU slice}" "${ZONE:?its zone}"
preset=$1 out=$2
shift 2

# %q quotes the arguments, because each host's shell parses the line again.
printf -v line '%q ' dsv3 train "$preset" --out "$out" --cluster auto "$@"
# --worker=all: every host runs the same command; JAX reads the process ids from the slice.
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$line"
