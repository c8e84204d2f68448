# The example worker as an image: docker build -f deploy/compose/worker.Dockerfile -t prism-worker deploy
FROM docker.io/library/python:3.13-slim-trixie
WORKDIR /worker
COPY workers/python/requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt && install -d -o 65532 -g 65532 /out
COPY workers/python/*.py ./
ENV OUT=/out
USER 65532:65532
VOLUME /out
ENTRYPOINT ["python3", "worker.py"]
