"""Layer kinds: how a module is seen as the matrix ``W`` of the paper.

A kind is a file with a `Layer` subclass decorated with ``@register(ItsModule)``, imported here.
"""

from tekfac.layers.assignment import Assignment, assign
from tekfac.layers.convolution import ConvLayer
from tekfac.layers.layer import Layer
from tekfac.layers.linear import LinearLayer
from tekfac.layers.registry import kind_of, register
from tekfac.layers.sample import Rows, Sample

__all__ = [
    "Assignment",
    "ConvLayer",
    "Layer",
    "LinearLayer",
    "Rows",
    "Sample",
    "assign",
    "kind_of",
    "register",
]
