# CUDA, torch and both packages; `docker run --gpus all IMAGE` runs the tests, `... make demo` the demo.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends git make g++ python3 python3-venv python3-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /dreamlip
COPY pyproject.toml setup.py constraints.txt Makefile README.md LICENSE ./
COPY csrc csrc
COPY dreamlip_kernels dreamlip_kernels
COPY dreamlip_train dreamlip_train
RUN make install
COPY . .
CMD ["make", "test"]
