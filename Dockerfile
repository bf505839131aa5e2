# The server parts and the operator in one image. BASE_IMAGE needs Python 3.11 or newer with venv.
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY requirements-image.lock ./
RUN python3 -m venv /opt/cloudai && /opt/cloudai/bin/pip install --no-cache-dir --require-hashes -r requirements-image.lock
COPY pyproject.toml README.md LICENSE ./
COPY cloudai cloudai
COPY controller controller
COPY agent agent
RUN /opt/cloudai/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM ${BASE_IMAGE}
COPY --from=build /opt/cloudai /opt/cloudai
ENV PATH=/opt/cloudai/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /tmp
EXPOSE 8080 8081
ENTRYPOINT ["cloudai"]
