"""The CNI contract: requests, results, versions, errors, the skeleton.

No I/O but stdin and stdout.
"""
