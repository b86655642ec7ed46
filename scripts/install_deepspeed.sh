#!/bin/sh
# DeepSpeed without its compiled parts, which CPUs can do without, into a folder of its own:
#   sh scripts/install_deepspeed.sh .venv/bin/python .venv/deepspeed
#
# In a folder of its own, because transformers and accelerate import it wherever they find it.
# tests/test_launch.py gives it to the workers of its ZeRO-3 tests alone.
set -eu
python=${1:-python3}
folder=${2:-.venv/deepspeed}
DS_BUILD_OPS=0 "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --upgrade --target "$folder" \
    deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 py-cpuinfo==9.0.0
DS_ACCELERATOR=cpu PYTHONPATH=$folder "$python" -c "import deepspeed" >/dev/null
