"""Families of models: how their tensors are named, here and elsewhere. Declarations only.

A family of one's own comes in by an entry point of the group `reshard.families`; its rules are made with the words that are gathered here.
"""

from reshard.families.registry import change_of, family, known_families, recognise, select_mapper
from reshard.planning.mapping.mappers import Family, RuleMapping
from reshard.planning.mapping.names import Rule
from reshard.planning.mapping.parts import concatenate, crop, either, flatten, interleave, pad, rename, stack, transpose

__all__ = [
    "Family",
    "Rule",
    "RuleMapping",
    "change_of",
    "concatenate",
    "crop",
    "either",
    "family",
    "flatten",
    "interleave",
    "known_families",
    "pad",
    "recognise",
    "rename",
    "select_mapper",
    "stack",
    "transpose",
]
