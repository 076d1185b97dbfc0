# syntax=docker/dockerfile:1
# Four images; compose.yaml runs them together, docs/deployment.md says how.
#
#   docker build --target scoring      --tag liber/scoring .       NVIDIA's Triton: serves a repository of target gpu
#   docker build --target scoring-cpu  --tag liber/scoring-cpu .   the wheel's Triton: serves a repository of target cpu
#   docker build --target llm          --tag liber/llm .           Triton with TensorRT-LLM: builds engines, serves an LLM
#   docker build --target worker       --tag liber/worker .        the liber command alone: workers, ingestion
#
# Every base is an argument with its version. To pin one to its very bytes, add the digest to the tag:
#   --build-arg PYTHON_TAG=3.11.16-slim-bookworm@sha256:...
#
# TRTLLM_TAG is the last release that NVIDIA documents engines for (TensorRT-LLM 1.2.1). Later ones are for the llmapi
# layout: --build-arg TRTLLM_TAG=26.07-trtllm-python-py3

ARG PYTHON_TAG=3.11.16-slim-bookworm
ARG TRITON_TAG=26.06-py3
ARG TRTLLM_TAG=26.06-trtllm-python-py3

# ---------------------------------------------------------------------------------------------------------------- wheel
# The compiler of the kernels stays here. The wheel serves every Python: its kernels are plain libraries.
FROM python:${PYTHON_TAG} AS wheel
RUN apt-get update && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md constraints.txt ./
COPY liber_runtime liber_runtime
# Without kernels the images would score four times slower and say nothing of it: better no image.
RUN pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt hatchling \
    && pip wheel --no-cache-dir --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir /wheels . \
    && ls liber_runtime/native/kernels.*.so

# --------------------------------------------------------------------------------------------------------------- worker
FROM python:${PYTHON_TAG} AS worker
ENV PATH=/opt/liber/bin:$PATH PYTHONUNBUFFERED=1
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    --mount=from=wheel,source=/source/constraints.txt,target=/constraints.txt \
    python -m venv --without-pip /opt/liber \
    && pip --python /opt/liber/bin/python install --no-cache-dir --disable-pip-version-check --only-binary :all: \
        --constraint /constraints.txt "$(echo /wheels/liber_runtime-*.whl)[redis,kafka,llm]" \
    && liber worker --help > /dev/null \
    && useradd --uid 10001 --create-home liber \
    && install --directory --owner liber --group liber /memory
USER 10001
WORKDIR /home/liber
ENV LIBER_STORE=sqlite:////memory/memory.db
VOLUME ["/memory"]
# Prometheus metrics.
EXPOSE 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9100/metrics', timeout=2)"]
# Exec form, here and below: SIGTERM reaches liber itself. A worker then lets its calls in flight end (30 s).
ENTRYPOINT ["liber"]
CMD ["worker", "--metrics-host", "0.0.0.0", "--metrics-port", "9100"]

# ---------------------------------------------------------------------------------------------------------- scoring-cpu
FROM python:${PYTHON_TAG} AS scoring-cpu
ENV PATH=/opt/liber/bin:$PATH PYTHONUNBUFFERED=1
# All that Triton would miss only when it starts is looked for now: the server, the stub for this Python, libpython
# (the official image has it in /usr/local/lib), numpy below 2.
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    --mount=from=wheel,source=/source/constraints.txt,target=/constraints.txt \
    python -m venv --without-pip /opt/liber \
    && pip --python /opt/liber/bin/python install --no-cache-dir --disable-pip-version-check --only-binary :all: \
        --constraint /constraints.txt "$(echo /wheels/liber_runtime-*.whl)[serve,redis,kafka]" \
    && python -c "import pathlib, sys; from liber_runtime.server.installation import plan_launch; \
plan_launch(pathlib.Path(sys.executable), {}, pathlib.Path('/tmp/plan'))" \
    && rm -r /tmp/plan \
    && useradd --uid 10001 --create-home liber \
    && install --directory --owner liber --group liber /models /memory
USER 10001
# Triton's log goes to runs/triton.log below this directory.
WORKDIR /home/liber
ENV LIBER_STORE=sqlite:////memory/memory.db
VOLUME ["/memory"]
# HTTP, gRPC, Triton's metrics, the supervisor's metrics.
EXPOSE 8000 8001 8002 8003
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
# On SIGTERM liber stops Triton within seconds and leaves nothing in /dev/shm.
ENTRYPOINT ["liber"]
CMD ["serve", "--repository", "/models", "--host", "0.0.0.0", "--supervisor-metrics-port", "8003"]

# -------------------------------------------------------------------------------------------------------------- scoring
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG} AS scoring
# First on the path: the Python of the two models that stay Python models is this one, with numpy below 2 of its own.
ENV PATH=/opt/liber/bin:$PATH PYTHONUNBUFFERED=1
# The extra `serve` less the wheel's Triton: this image has its own.
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    --mount=from=wheel,source=/source/constraints.txt,target=/constraints.txt \
    /usr/bin/python3 -m venv --without-pip /opt/liber \
    && pip --python /opt/liber/bin/python install --no-cache-dir --disable-pip-version-check --only-binary :all: \
        --constraint /constraints.txt "$(echo /wheels/liber_runtime-*.whl)[redis,kafka]" onnx onnxruntime tokenizers \
    && python -c "import pathlib, sys; from liber_runtime.server.installation import plan_launch; \
plan = plan_launch(pathlib.Path(sys.executable), {}, pathlib.Path('/tmp/plan')); \
sys.exit(None if (plan.backends / 'onnxruntime').is_dir() else f'{plan.backends} has no onnxruntime backend')" \
    && useradd --uid 10001 --create-home liber \
    && install --directory --owner liber --group liber /models /memory
USER 10001
WORKDIR /home/liber
ENV LIBER_STORE=sqlite:////memory/memory.db
VOLUME ["/memory"]
EXPOSE 8000 8001 8002 8003
# ONNX Runtime takes its time with a GPU's first graph.
HEALTHCHECK --interval=10s --timeout=3s --start-period=180s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
# NVIDIA's entry point checks the driver, then becomes (exec) what follows.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "liber"]
CMD ["serve", "--repository", "/models", "--host", "0.0.0.0", "--supervisor-metrics-port", "8003"]

# ------------------------------------------------------------------------------------------------------------------ llm
# For two things: `liber build engine`, since only the TensorRT that built an engine runs it, and `tritonserver` on the
# repository with that engine. `python3` stays the image's own, untouched. liber has packages to itself, with its pinned
# versions, and sees those of the image behind them: TensorRT-LLM.
FROM nvcr.io/nvidia/tritonserver:${TRTLLM_TAG} AS llm
ENV PYTHONUNBUFFERED=1
COPY builders /opt/liber/source/builders
COPY model_repository /opt/liber/source/model_repository
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    --mount=from=wheel,source=/source/constraints.txt,target=/constraints.txt \
    /usr/bin/python3 -m venv --without-pip /opt/liber \
    && pip --python /opt/liber/bin/python install --no-cache-dir --disable-pip-version-check --only-binary :all: \
        --constraint /constraints.txt "$(echo /wheels/liber_runtime-*.whl)" \
    && { echo /opt/liber/source; python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; } \
        > "$(/opt/liber/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/image.pth" \
    && ln -s /opt/liber/bin/liber /usr/local/bin/liber \
    && liber build engine --help > /dev/null \
    && /opt/liber/bin/python -c "from importlib.metadata import version; print(version('tensorrt_llm'))" \
    && useradd --uid 10001 --create-home liber \
    && install --directory --owner liber --group liber /llm
USER 10001
WORKDIR /home/liber
EXPOSE 8000 8001 8002
# Billions of weights are read before it is ready.
HEALTHCHECK --interval=10s --timeout=3s --start-period=900s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh"]
# For engines on one GPU; docs/deployment.md has the commands for more GPUs and for the llmapi layout.
CMD ["tritonserver", "--model-repository=/llm/models", "--disable-auto-complete-config", "--exit-timeout-secs=20", \
    "--http-address=0.0.0.0", "--grpc-address=0.0.0.0", "--metrics-address=0.0.0.0"]
