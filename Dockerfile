# selftaught with vLLM for one NVIDIA GPU.
#
#     docker build -t selftaught .
#     docker run --rm --gpus all --ipc host -v "$PWD/runs:/work/runs" -v hf:/root/.cache/huggingface \
#         selftaught star --model Qwen/Qwen2.5-0.5B --task gsm8k --learning-rate 1e-5 --sampler vllm --bf16
#
# Not tested: this image has not been built or run on a machine with a GPU. vLLM chooses the version of torch, which
# comes with its own CUDA libraries, so a plain Python image is enough. The host needs a driver that supports that CUDA
# version, and the NVIDIA Container Toolkit.
FROM python:3.12-slim

# vLLM compiles small kernels at its first start
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY selftaught ./selftaught
RUN pip install ".[vllm,math,gym]"

WORKDIR /work
ENTRYPOINT ["selftaught"]
CMD ["--help"]
