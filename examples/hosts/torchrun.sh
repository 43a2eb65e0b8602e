#!/usr/bin/env bash
# Several machines under plain torchrun: start this script on each of them.
#
#   NNODES=2 HEAD=10.0.0.1 bash examples/hosts/torchrun.sh     # on both; HEAD is the address of one of them
#
# One process a machine: it runs as many workers as the machine has cores. RUN must be a folder that all
# machines see, so that a run goes on whichever of them becomes host 0.
set -euo pipefail

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" \
  --nproc-per-node="${PROCESSES:-1}" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="${HEAD:-localhost}:${PORT:-29500}" \
  --rdzv-id="${RUN_ID:-hotloop}" \
  --max-restarts="${RESTARTS:-3}" \
  -m hotloop train mnist --out "${RUN:-runs/mnist}" --auto-resume \
  --thread-affinity compact --checkpoint-every-s 60 "$@"
