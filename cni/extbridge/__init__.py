"""Virtual machines in pods, straight onto the switch outside: a CNI plugin for macvtap."""
