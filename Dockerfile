# Dependencies are installed in one stage and copied to the other, which has no pip cache.

FROM python:3.13.9-slim-bookworm AS build
WORKDIR /app
COPY requirements.txt .
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir -r requirements.txt

FROM python:3.13.9-slim-bookworm
LABEL org.opencontainers.image.title="A small LLM chat service" \
      org.opencontainers.image.version="1.0.0" \
      org.opencontainers.image.licenses="MIT"
WORKDIR /app
RUN useradd --system --uid 10001 chat
COPY --from=build /venv /venv
COPY server.py openapi.yaml ./
COPY chat chat
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ.get(\"PORT\", \"8000\")}/health', timeout=2)"]
CMD ["python", "server.py"]
