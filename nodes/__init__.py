"""The ComfyUI side: thin V3 nodes over the `unidiffuser` library, and its network as a native MODEL.

This folder is the only place that imports the host. It holds no sampling code: a node reads its inputs, calls
the library and returns host types.
"""
