# Everything ds_efficient needs on NVIDIA GPUs, with its kernels built for sm_80 and sm_90a.
#
#   docker build -t ds_efficient .
#   docker run --rm --gpus all --ipc host ds_efficient ds_efficient env
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/workspace/runs" ds_efficient \
#       deepspeed /opt/ds_efficient/launch/pretrain_gpt.py --deepspeed_config ... --save runs/a
#
# --ipc host: NCCL and data loaders need more shared memory than a container gets.
ARG CUDA_VERSION=13.0.1
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu24.04

ARG PYTHON_VERSION=3.12
ARG TORCH_VERSION=2.13.0
ARG DEEPSPEED_VERSION=0.19.8
ARG MEGATRON_CORE_VERSION=0.19.2
ARG TRANSFORMERS_VERSION=5.23.0
ARG TOKENIZERS_VERSION=0.23.3
ARG SENTENCEPIECE_VERSION=0.2.3
ARG SAFETENSORS_VERSION=0.8.0
ARG MATPLOTLIB_VERSION=3.11.2
ARG PYDANTIC_VERSION=2.14.3
ARG NINJA_VERSION=1.13.2
ARG ARCHITECTURES="8.0;9.0a"
ARG USER_ID=1001

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        python${PYTHON_VERSION} python${PYTHON_VERSION}-venv python${PYTHON_VERSION}-dev \
        g++ git openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    TORCH_EXTENSIONS_DIR=/opt/torch_extensions \
    PIP_CONSTRAINT=/opt/constraints.txt \
    PIP_NO_CACHE_DIR=1 \
    DS_BUILD_OPS=0

# The large packages first: this layer stays when only the project changes.
RUN printf '%s\n' \
        "torch==${TORCH_VERSION}" "deepspeed==${DEEPSPEED_VERSION}" "megatron-core==${MEGATRON_CORE_VERSION}" \
        "transformers==${TRANSFORMERS_VERSION}" "tokenizers==${TOKENIZERS_VERSION}" \
        "sentencepiece==${SENTENCEPIECE_VERSION}" "safetensors==${SAFETENSORS_VERSION}" \
        "matplotlib==${MATPLOTLIB_VERSION}" "pydantic==${PYDANTIC_VERSION}" "ninja==${NINJA_VERSION}" \
        > /opt/constraints.txt \
    && python${PYTHON_VERSION} -m venv /opt/venv \
    && pip install torch ninja \
    && pip install deepspeed megatron-core transformers tokenizers sentencepiece safetensors matplotlib pydantic

RUN useradd --create-home --uid ${USER_ID} trainer \
    && install -d -o trainer -g trainer /opt/torch_extensions /workspace

WORKDIR /opt/ds_efficient
COPY pyproject.toml setup.py README.md ./
COPY ds_efficient ds_efficient
COPY megatron_patches megatron_patches
COPY launch launch
COPY ds_configs ds_configs
RUN pip install --editable ".[megatron,data,report,hf]"

USER trainer
RUN ds_efficient prebuild --arch "${ARCHITECTURES}" && ds_efficient env
WORKDIR /workspace
CMD ["bash"]
