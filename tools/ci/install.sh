#!/usr/bin/env bash
# Makes a virtual environment that has ia3-export (CPU build) in the versions of constraints.txt:
#   bash tools/ci/install.sh FOLDER
# $PYTHON       the interpreter to start from (default: python3)
# $TORCH_INDEX  package index for torch (default: PyTorch's own of CPU builds); empty: pip's configuration decides
set -euo pipefail

folder=${1:?usage: install.sh FOLDER}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt")
# first and alone: as a dependency torch would come with gigabytes of CUDA packages
if [ -n "$index" ]; then
  "${pip[@]}" --index-url "$index" torch
else
  "${pip[@]}" torch
fi
"${pip[@]}" "${root}[cpu]"
