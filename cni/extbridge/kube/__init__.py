"""What extbridge has to do with Kubernetes itself."""
