"""What a network is, and what a request wants of it. Reads definition files; asks no kernel."""
