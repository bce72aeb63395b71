# What answers, and nothing that trains, judges or registers: visionloop[serve] with the versions of its own lock.
FROM python:3.11-slim-bookworm AS build
WORKDIR /opt/visionloop
RUN pip install --no-cache-dir "setuptools>=80"
COPY pyproject.toml README.md LICENSE ./
COPY components components
COPY flows flows
COPY monitoring monitoring
COPY registry registry
COPY serving serving
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
COPY infra/locks/serve.txt /tmp/serve.txt
COPY --from=build /wheels /tmp/wheels
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement /tmp/serve.txt \
    && pip install --no-cache-dir --no-deps /tmp/wheels/*.whl && rm -r /tmp/serve.txt /tmp/wheels \
    && useradd --create-home --uid 1000 visionloop && visionloop init --serving /workspace \
    && chown --recursive visionloop /workspace
ENV PYTHONUNBUFFERED=1
USER visionloop
WORKDIR /workspace
ENTRYPOINT ["visionloop"]
