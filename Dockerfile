# The command for CPUs, as an image.  docker build -t gemma-awq .      (--build-arg EXTRAS=full, or EXTRAS= for none)
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" gemma-awq quantize ./my-gemma
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" -p 8000:8000 gemma-awq serve ./my-gemma-AWQ --host 0.0.0.0
# Models of the hub and everything else that can be fetched or made again lie in /cache: give it a volume to keep them.
ARG PYTHON=3.13
FROM python:${PYTHON}-slim AS build
ARG EXTRAS=serve
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/gemma-awq
ENV PATH=/opt/gemma-awq/bin:$PATH
WORKDIR /source
COPY constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY gemma_awq_cli gemma_awq_cli
COPY calibration calibration
COPY docs docs
# with the engine compiled for this kind of processor, so that the image needs no compiler
RUN case "$(uname -m)" in x86_64) wheel=linux-x86_64 ;; aarch64) wheel=linux-arm64 ;; esac \
    && GEMMA_AWQ_WHEEL=$wheel pip wheel --no-cache-dir --no-deps -w dist . \
    && pip install --no-cache-dir -c constraints.txt "$(echo dist/*.whl)${EXTRAS:+[$EXTRAS]}" \
    && pip uninstall --yes pip

FROM python:${PYTHON}-slim
COPY --from=build /opt/gemma-awq /opt/gemma-awq
# whoever the container runs as may write to its home
RUN mkdir -m 1777 /cache /work
ENV PATH=/opt/gemma-awq/bin:$PATH HOME=/cache
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["gemma-awq"]
CMD ["--help"]
