# Two images: `light` (monitor and predictor, which import no torch today) and `torch` (trainer).
# Built by docker-compose.yml. No secret is needed or kept; passwords arrive as environment at run time.
FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The volume `runs` takes its owner from this folder, so every node may write there.
RUN useradd --uid 10001 --create-home hpt && install -d -o hpt -g hpt /runs
WORKDIR /app
COPY pyproject.toml constraints.txt requirements.lock README.md LICENSE ./
# Everything but torch: by far the largest package, and only the trainer needs it.
RUN pip install --require-hashes --no-deps -r requirements.lock
COPY common common
COPY predictor_node predictor_node
COPY monitor_node monitor_node
COPY trainer_node trainer_node

FROM base AS light
RUN pip install --no-deps --no-build-isolation .
WORKDIR /runs
USER hpt

FROM base AS torch
# Empty = PyPI, whose Linux wheel brings the CUDA libraries. Pinned by version, not by hash: see SECURITY.md.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
    && pip install --no-deps --no-build-isolation .
WORKDIR /runs
USER hpt
