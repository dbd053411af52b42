"""Kubernetes: the API server. The only importers of its client, and of gRPC."""
