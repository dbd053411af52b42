"""Kubernetes: the API server, and kubelet's device plugins; only here are their libraries."""
