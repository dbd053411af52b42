"""kubelet's device plugin API: the messages, and what they are generated from."""
