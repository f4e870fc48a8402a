"""Tiny models of every architecture of transformers, and whether a method trains them."""

from tests.zoo.build import Cell, Unavailable, build
from tests.zoo.heads import HEADS, architectures, cells
from tests.zoo.trains import Outcome, methods_of, trains

__all__ = [
    "HEADS",
    "Cell",
    "Outcome",
    "Unavailable",
    "architectures",
    "build",
    "cells",
    "methods_of",
    "trains",
]
