"""Conversion between the original LaVIT layout and the models of this library."""

from .convert import convert
from .errors import ConversionError
from .heads import parse_heads
from .original import convert_to_original
from .plan import Plan, plan

__all__ = ["ConversionError", "Plan", "convert", "convert_to_original", "parse_heads", "plan"]
