# kvarn in a container. Targets: cpu (default) and cuda.
#   docker build --target cpu -t kvarn:cpu .
#   docker build --target cuda -t kvarn:cuda .                                           for Hopper GPUs
#   docker run --rm --gpus all -p 8000:8000 -p 8001:8001 kvarn:cuda
#   docker run --rm -p 8000:8000 -p 8001:8001 kvarn:cpu                                  the demo model
#   docker run --rm -p 8000:8000 -v /models/Qwen3-8B:/model:ro kvarn:cpu serve --model /model
# deploy/test/replay.py runs these stages in chroots where no container engine is at hand.

FROM debian:12-slim AS build
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      build-essential cmake ninja-build pkg-config ca-certificates \
      libgrpc++-dev protobuf-compiler-grpc libprotobuf-dev protobuf-compiler \
      nlohmann-json3-dev libspdlog-dev libfmt-dev libcli11-dev libboost1.81-dev \
      libpcre2-dev libutf8proc-dev libssl-dev && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . /src
# What /version names; the build context has no .git: --build-arg KVARN_COMMIT=$(git rev-parse --short=12 HEAD)
ARG KVARN_COMMIT=
RUN cmake -S . -B /build -G Ninja -DCMAKE_BUILD_TYPE=Release -DKVARN_CUDA=OFF -DKVARN_TESTS=OFF \
      -DKVARN_COMMIT="$KVARN_COMMIT" && \
    ninja -C /build kvarn && \
    strip /build/bin/kvarn

# The CUDA images are Ubuntu 24.04. cuBLASLt comes with the runtime image, the driver with the host.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build-cuda
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      build-essential cmake ninja-build pkg-config ca-certificates \
      libgrpc++-dev protobuf-compiler-grpc libprotobuf-dev protobuf-compiler \
      nlohmann-json3-dev libspdlog-dev libfmt-dev libcli11-dev libboost1.83-dev \
      libpcre2-dev libutf8proc-dev libssl-dev && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . /src
# What /version names; the build context has no .git: --build-arg KVARN_COMMIT=$(git rev-parse --short=12 HEAD)
ARG KVARN_COMMIT=
RUN cmake -S . -B /build -G Ninja -DCMAKE_BUILD_TYPE=Release -DKVARN_CUDA=ON -DKVARN_TESTS=OFF \
      -DKVARN_COMMIT="$KVARN_COMMIT" && \
    ninja -C /build kvarn && \
    strip /build/bin/kvarn

FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04 AS cuda
RUN groupadd --gid 10001 kvarn && useradd --uid 10001 --gid kvarn --no-create-home --shell /usr/sbin/nologin kvarn
COPY --from=build-cuda /build/bin/kvarn /usr/local/bin/kvarn
COPY assets/demo-model /usr/share/kvarn/demo-model
ENV KVARN_HOST=0.0.0.0
ENV KVARN_MODEL=/usr/share/kvarn/demo-model
# Without --gpus it must say so, not fall back to a CPU nobody sized.
ENV KVARN_DEVICE=cuda
USER kvarn
WORKDIR /
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD bash -c 'exec 3<>/dev/tcp/127.0.0.1/8000 && printf "GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n" >&3 && head -n 1 <&3 | grep -q " 200 "'
ENTRYPOINT ["kvarn"]
CMD ["serve"]

FROM debian:12-slim AS cpu
RUN groupadd --gid 10001 kvarn && useradd --uid 10001 --gid kvarn --no-create-home --shell /usr/sbin/nologin kvarn
COPY --from=build /build/bin/kvarn /usr/local/bin/kvarn
COPY assets/demo-model /usr/share/kvarn/demo-model
# Inside a container the door must face outwards; publish ports only where you mean to.
ENV KVARN_HOST=0.0.0.0
ENV KVARN_MODEL=/usr/share/kvarn/demo-model
USER kvarn
WORKDIR /
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
# The image has no curl: bash speaks HTTP well enough to ask for the status line.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD bash -c 'exec 3<>/dev/tcp/127.0.0.1/8000 && printf "GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n" >&3 && head -n 1 <&3 | grep -q " 200 "'
ENTRYPOINT ["kvarn"]
CMD ["serve"]
