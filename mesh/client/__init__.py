"""The clients over gRPC: `blocking` for scripts and notebooks, `aio` for services under trio."""
