"""Layer kinds: how a weight is seen as the matrix ``W`` of the paper, and how its uses are found.

A kind is a file with a `Layer` subclass; `assignment` says which weights are of it, `uses` which
nodes of the autograd graph multiply them, `view` what of a weight these see.
"""

from tekfac.layers.assignment import Assignment, Candidate, assign, layer_of
from tekfac.layers.convolution import ConvLayer
from tekfac.layers.embedding import EmbeddingLayer
from tekfac.layers.geometry import Geometry
from tekfac.layers.kinds import as_used
from tekfac.layers.layer import Form, Layer
from tekfac.layers.linear import LinearLayer
from tekfac.layers.sample import Call, Rows, Sample
from tekfac.layers.stack import StackLayer
from tekfac.layers.uses import Product, product_of, register_product
from tekfac.layers.view import View

__all__ = [
    "Assignment",
    "Call",
    "Candidate",
    "ConvLayer",
    "EmbeddingLayer",
    "Form",
    "Geometry",
    "Layer",
    "LinearLayer",
    "Product",
    "Rows",
    "Sample",
    "StackLayer",
    "View",
    "as_used",
    "assign",
    "layer_of",
    "product_of",
    "register_product",
]
