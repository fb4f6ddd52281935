# The same pins as everywhere else, on CUDA.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv make git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY conf conf
COPY src src
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir '.[preprocess]' -c constraints.txt
ENV PATH=/venv/bin:$PATH
COPY train.py encode_latents.py evaluate.py ./
ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
