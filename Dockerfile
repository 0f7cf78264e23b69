# One image for a key provider: `skipbus api|syncer|janitor`, `skipbus ready|alive` for probes, and `skipctl`.
#
#   docker build -t skipbus .
#
# Everything that is installed is pinned with hashes in requirements/. A package index other than the public one, or
# an authority for it, is given by a pip configuration that does not stay in the image:
#
#   docker build -t skipbus --secret id=pip_conf,src="$HOME/.config/pip/pip.conf" .
#
# The two stages start from the same base, so that the environment made in the first one fits the second.
ARG BASE_IMAGE=python:3.13-slim-trixie

FROM ${BASE_IMAGE} AS build
# Times in what is built come from here, so that the same sources make the same files.
ARG SOURCE_DATE_EPOCH=1767225600
ENV SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} \
    PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# Wheels only: nothing is compiled here, and no package's own code runs. The environments have no pip of their own.
COPY requirements/runtime.txt requirements/build.txt requirements/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python -m venv --without-pip /opt/skipbus && python -m venv --without-pip /opt/build \
 && python -m pip --python /opt/skipbus/bin/python install --require-hashes --only-binary :all: -r requirements/runtime.txt \
 && python -m pip --python /opt/build/bin/python install --require-hashes --only-binary :all: -r requirements/build.txt

COPY pyproject.toml README.md LICENSE ./
COPY shared shared
COPY services services
COPY skipctl skipctl
COPY skipbus skipbus
RUN /opt/build/bin/python -c "from setuptools.build_meta import build_wheel; build_wheel('/dist')" \
 && python -m pip --python /opt/skipbus/bin/python install --no-index --no-deps /dist/*.whl
# Byte code beforehand, since nobody can write it later; by hash, since times in images say nothing.
RUN python -m compileall -q --invalidation-mode unchecked-hash /opt/skipbus/lib \
 && find /opt/skipbus/lib -path '*/skipbus-*.dist-info/direct_url.json' -delete
COPY compose /opt/skipbus/share/skipbus/compose

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="skipbus" \
      org.opencontainers.image.description="A SKIP key provider (draft-cisco-skip-02)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# One user for all three services, because all three read the keyring. A fresh volume takes the folder's owner and mode.
RUN groupadd --system --gid 10001 skipbus \
 && useradd --system --uid 10001 --gid skipbus --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin skipbus \
 && install -d -m 700 -o skipbus -g skipbus /var/lib/skipbus /var/lib/skipbus/keyring \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/ldconfig/aux-cache
COPY --from=build /opt/skipbus /opt/skipbus

# Metrics and probes stay inside of the container: 127.0.0.1 there.
ENV PATH=/opt/skipbus/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    SKIP_KEYRING_DIR=/var/lib/skipbus/keyring SKIP_METRICS_PORT=9464
USER skipbus:skipbus
WORKDIR /var/lib/skipbus
EXPOSE 8443
# The service is PID 1 itself: it takes SIGTERM and drains within 10 s. Give it 15 (`stop_grace_period`).
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["skipbus", "ready"]
ENTRYPOINT []
CMD ["skipbus", "--help"]
