"""Tiny models of every architecture of transformers, and whether a method trains them."""

from tests.zoo.build import Cell, Unavailable, build
from tests.zoo.heads import HEADS, architectures, cells

__all__ = ["HEADS", "Cell", "Unavailable", "architectures", "build", "cells"]
