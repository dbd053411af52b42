"""What may be wrong on a node, looked for and told with what to do about it.

Each check yields findings. Nothing is changed; what is tried for real is tried in namespaces of its
own, which are gone afterwards whatever happens.
"""
