"""Networks by name, each of any width, for images of any size that its pooling leaves something of.

A file for each family, built of ``parts``, and a line for each network in ``registry.NETWORKS``.
"""

from tekfac.networks.parts import ImageShape
from tekfac.networks.registry import NETWORKS, Network, build, resolve_width

__all__ = ["NETWORKS", "ImageShape", "Network", "build", "resolve_width"]
