# What the suites need beside the working copy, on the Python of the image. Built in requirements/:
#
#   docker build -f tests/containers/test.Dockerfile -t skipbus-suites requirements
#
# The working copy is mounted when tests run in it, so that a change to the code needs no new image. The base and the
# way to a package index are the image's own (see Dockerfile).
ARG BASE_IMAGE=python:3.13-slim-trixie
FROM ${BASE_IMAGE}
# Debian's own clients, and stunnel.
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends curl stunnel4 >/dev/null \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
COPY dev.txt /requirements/dev.txt
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python -m venv /opt/tests \
 && /opt/tests/bin/python -m pip install --require-hashes --only-binary :all: -r /requirements/dev.txt
# Hypothesis keeps its examples beside the tests where nobody says otherwise, and the working copy is read-only.
ENV PATH=/opt/tests/bin:$PATH HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
WORKDIR /skipbus
