# On a CPU: docker build -t swin-unetr-bundles . && docker run --rm -v "$PWD/out:/app/demo/out" swin-unetr-bundles
# pip takes a build of PyTorch with CUDA: add --gpus all to the run, on a machine with NVIDIA's driver and Container Toolkit.
# Without a GPU, add --build-arg TORCH_INDEX=ADDRESS to the build, the address of CPU builds: the selector on pytorch.org has it.
# Another command takes the demo's place: ... -v /data:/data -v /runs:/runs swin-unetr-bundles python -m monai.bundle run ...
FROM python:3.12-slim
ARG TORCH_INDEX=
ENV PYTHONUNBUFFERED=1
WORKDIR /app
COPY setup.cfg setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY bundles bundles
COPY demo demo
COPY tools tools
COPY zoo zoo
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt --editable ".[dicom]"
CMD ["python", "-m", "demo.run"]
