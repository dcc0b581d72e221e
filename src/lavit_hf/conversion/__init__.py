"""Conversion between the original LaVIT layout and the models of this library."""

from .configs import parse_heads
from .convert import convert
from .mapping import Plan, plan
from .original import convert_to_original
from .verification import verify
from .weight_files import ConversionError

__all__ = ["ConversionError", "Plan", "convert", "convert_to_original", "parse_heads", "plan", "verify"]
