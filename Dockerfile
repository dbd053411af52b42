# What a node runs: the agent, the installer of its CNI executables, and launchers in Python.
#
#   docker build --tag extbridge:0.1.0 .
#
# Only package registries are asked: Debian's, as the base's apt knows them, and PyPI, or whatever
# a pip.conf names instead that is given as a secret (--secret id=pip.conf,src=pip.conf).
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get -qq update \
    && apt-get -qq install --no-install-recommends gcc musl-tools python3-venv >/dev/null
# The pip that installs is not in what it installs into.
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/extbridge
COPY . /source
# Files of the wheel have this time, and so has what is compiled from them.
ARG SOURCE_DATE_EPOCH=1767225600
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /pip/bin/pip --python /opt/extbridge/bin/python --no-cache-dir --disable-pip-version-check \
        install --quiet --no-compile /source
# Compiled here because nothing can be written where it runs; not by time, which copies may change.
# Of the Kubernetes client, which is generated and would be 120 MB, one half is for asyncio and not
# used, with aiohttp and all that it alone brings; of the other half the compiled form alone is kept.
# rich brings Pygments and a Markdown parser for what is not shown here.
RUN cd /opt/extbridge/lib/*/site-packages \
    && rm -rf kubernetes/aio \
    && /pip/bin/pip --python /opt/extbridge/bin/python --disable-pip-version-check uninstall --quiet \
        --yes aiohttp aiohttp-retry aiohappyeyeballs aiosignal attrs frozenlist multidict propcache \
        yarl Pygments markdown-it-py mdurl \
    && if [ -e kubernetes/client ]; then \
        /pip/bin/python -m compileall -qb --invalidation-mode unchecked-hash kubernetes/client \
        && find kubernetes/client -name '*.py' -delete; fi \
    && /pip/bin/python -m compileall -q --invalidation-mode unchecked-hash . \
    && ln -s "$PWD/extbridge/shim/extbridge" /opt/extbridge/bin/extbridge-shim

FROM ${BASE}
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get -qq update \
    && apt-get -qq install --no-install-recommends python3 >/dev/null \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*
COPY --from=build /opt/extbridge /opt/extbridge
ENV PATH=/opt/extbridge/bin:/usr/sbin:/usr/bin:/sbin:/bin
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="extbridge" \
      org.opencontainers.image.description="Virtual machines in pods, straight onto the switch outside: a CNI plugin for macvtap" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENTRYPOINT ["extbridge"]
