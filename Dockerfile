# On a CPU: docker build -t swin-unetr-bundles . && docker run --rm -v "$PWD/out:/app/demo/out" swin-unetr-bundles
# With CUDA: add --build-arg TORCH_INDEX=https://pypi.org/simple to the build (PyPI's PyTorch for Linux is a CUDA build of some
# gigabytes) and --gpus all to the run, on a machine with NVIDIA's driver and Container Toolkit.
# Another command takes the demo's place: ... -v /data:/data -v /runs:/runs swin-unetr-bundles python -m monai.bundle run ...
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1
WORKDIR /app
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY bundles bundles
COPY demo demo
COPY tools tools
COPY zoo zoo
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint constraints.txt --editable .
CMD ["python", "-m", "demo.run"]
