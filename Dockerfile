# docker build --build-arg EXTRA=tpu --tag elder_jax:tpu .
#   EXTRA: tpu, cuda (the host needs an NVIDIA driver only), or unset for CPU
# docker run --volume "$PWD/runs:/runs" elder_jax:cpu --flagfile=configs/X.flags --workdir=/runs/X
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG EXTRA=""

WORKDIR /opt/elder_jax
# Dependencies are installed from these files only, so that a change of the code does not reinstall them.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY elder_jax/__init__.py elder_jax/
COPY configs configs
RUN pip install --no-cache-dir --editable ".[data,gguf,report${EXTRA:+,$EXTRA}]"
COPY elder_jax elder_jax

RUN useradd --create-home --uid 1000 elder
USER 1000
# Exec form without a shell, so that SIGTERM reaches elder_jax.
ENTRYPOINT ["python", "-m", "elder_jax.main"]
