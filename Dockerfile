# clerk-sync's image. `make image` builds it, `make test-image` tries it out.

# Every stage stands on the same base: the virtual environment knows its interpreter by path.
ARG BASE=docker.io/library/python:3.13.16-slim-trixie@sha256:70729b46c69b4f1e97c4822c1af3df53a1476cf5ddc6c087c0c10bc3a5678c2f

# Dependencies: wheels alone, each with a hash of the lock file.
FROM ${BASE} AS dependencies
ENV UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_NO_MANAGED_PYTHON=1 \
    UV_SYSTEM_CERTS=1 \
    # Without it, no two builds have the same bytecode.
    PYTHONHASHSEED=0
WORKDIR /build

# Debian's binutils have `strip`; whatever their version, what they take away is debug symbols.
# hadolint ignore=DL3008
RUN set -eu; \
    apt-get update -qq; \
    apt-get install -qq --no-install-recommends binutils >/dev/null; \
    apt-get clean; \
    rm -rf /var/lib/apt/lists/*

COPY requirements-dev.lock ./
RUN set -eu; \
    sed -n '/^uv==/,/[^\\]$/p' requirements-dev.lock >uv.lock; \
    python3 -m venv /uv; \
    /uv/bin/python -m pip install --quiet --no-cache-dir --require-hashes --no-deps \
      --requirement uv.lock

# Half of these wheels is debug symbols and the C sources of their extensions; then come their own
# tests, and commands that nobody calls here.
COPY requirements.lock ./
RUN set -eu; \
    /uv/bin/uv venv --quiet --python /usr/local/bin/python3 /app; \
    /uv/bin/uv pip install --quiet --python /app --require-hashes --only-binary :all: \
      --requirement requirements.lock; \
    find /app -name '*.so' -exec strip --strip-unneeded {} +; \
    find /app -type f -regex '.*\.\(c\|h\|cpp\|hpp\|pyx\|pxd\|pyi\)' -delete; \
    find /app -depth -type d -regex '.*/\(tests\|testing\)' -exec rm -r {} +; \
    find /app/bin -type f -delete; \
    find /app -maxdepth 1 -type f ! -name pyvenv.cfg -delete; \
    python3 -m compileall -q --invalidation-mode unchecked-hash /app

# clerk-sync itself, apart, so that a new version of it is a small layer.
FROM dependencies AS package
COPY pyproject.toml README.md LICENSE ./
COPY service/ service/
RUN set -eu; \
    /uv/bin/uv build --quiet --wheel --out-dir dist \
      --require-build-hashes --build-constraints requirements-dev.lock; \
    /uv/bin/uv pip install --quiet --python /app --prefix /package --no-deps \
      --no-index --find-links dist clerk-sync; \
    # uv notes the time in there: then no two builds are the same.
    sed -i '/uv_cache\.json/d' /package/lib/python*/site-packages/clerk_sync-*/RECORD; \
    rm /package/.lock /package/lib/python*/site-packages/clerk_sync-*/uv_cache.json; \
    python3 -m compileall -q --invalidation-mode unchecked-hash -s /package -p /app /package

FROM ${BASE}
ENV PATH=/app/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# The base comes without bytecode, and nobody could write it later: without this, half a second more
# to start. pip goes, as nothing is ever installed here. Of Debian's programs, none may make its caller
# somebody else. /data is where the embedded database is, if nothing else is set: all that the user owns.
RUN set -eu; \
    stdlib=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))'); \
    rm -rf "$stdlib/ensurepip" "$stdlib"/site-packages/pip* /usr/local/bin/pip*; \
    PYTHONHASHSEED=0 python3 -m compileall -q --invalidation-mode unchecked-hash \
      -x 'idlelib|turtledemo|tkinter|lib2to3' "$stdlib"; \
    find / -xdev -type f -perm /6000 -exec chmod ug-s {} +; \
    install --directory --owner 65532 --group 65532 /data
COPY --from=dependencies /app /app
COPY --from=package /package /app
WORKDIR /data
USER 65532:65532
# 8081, with probes, metrics and people's rows, is not to be published.
EXPOSE 8080
ENTRYPOINT ["clerk-sync"]
CMD ["serve"]

ARG VERSION=""
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.title=clerk-sync \
      org.opencontainers.image.description="Keeps an app's MySQL tables in sync with Clerk, from signed webhooks" \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.source=https://github.com/clerk-sync/clerk-sync \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.created=$CREATED
