"""One machine as a small data centre: NIC, switch, pods and guests, for the demo and the tests."""
