"""What the kernel is asked: namespaces, links, taps, silence. The only layer with system calls."""
