# The scoring image for CPUs: the `liber` command with Triton, and nothing that builds bundles.
#
#   docker build --tag liber .
#   docker network create liber
#   docker run --name scoring --network liber --shm-size 1g --publish 127.0.0.1:8001:8001 \
#     --volume "$PWD/runs/models:/models:ro" --volume memory:/memory liber
#
# Triton's Python models pass tensors through /dev/shm: 16 MiB for each loaded version of each of six models, and two
# versions are kept loaded. Docker's default of 64 MB is too little; without --shm-size the models do not load.
#
# The worker is the same image with another command. It serves no HTTP to be asked for its health:
#
#   docker run --name worker --network liber --no-healthcheck --env LIBER_TRITON=scoring:8001 \
#     --volume memory:/memory liber worker
#
# Over one SQLite file scoring and worker run on one machine, over a volume on a local disk. With a Redis or a Redis Cluster
# (--env LIBER_STORE=redis://user:password@host:6379/0) they run on as many machines as you like.

ARG PYTHON_TAG=3.11.14-slim-bookworm

FROM python:${PYTHON_TAG} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The compiler of the kernels stays in this stage.
RUN apt-get update && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md constraints.txt ./
COPY liber_runtime liber_runtime
RUN pip wheel --no-deps --wheel-dir /wheels . \
    && python -m venv --without-pip /opt/liber \
    && pip --python /opt/liber/bin/python install --only-binary :all: --constraint constraints.txt \
        "$(echo /wheels/liber_runtime-*.whl)[serve,redis,kafka]"

FROM python:${PYTHON_TAG}
ENV PATH=/opt/liber/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=builder /opt/liber /opt/liber
# All that Triton would miss only when it starts is looked for now: the server, the stub for this Python, libpython
# (the official image has it in /usr/local/lib), numpy below 2.
RUN python -c "import pathlib, sys; from liber_runtime.server.installation import plan_launch; \
plan_launch(pathlib.Path(sys.executable), {}, pathlib.Path('/tmp/plan'))" \
    && rm -r /tmp/plan \
    && useradd --uid 10001 --create-home liber \
    && install --directory --owner liber --group liber /models /memory
USER 10001
# Triton's log goes to runs/triton.log below this directory.
WORKDIR /home/liber
ENV LIBER_STORE=sqlite:////memory/memory.db
VOLUME ["/models", "/memory"]
# HTTP, gRPC, Prometheus metrics.
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
# Exec form: SIGTERM reaches liber, which stops Triton within seconds and leaves nothing in /dev/shm.
ENTRYPOINT ["liber"]
CMD ["serve", "--repository", "/models", "--host", "0.0.0.0"]
