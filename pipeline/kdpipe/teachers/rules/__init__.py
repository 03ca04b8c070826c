"""A knowledge base of labelling rules as a teacher: soft labels with coverage, constraints, initial weights."""

from kdpipe.teachers.rules.linear import LinearWeights, linear_from_rules
from kdpipe.teachers.rules.teacher import ConstrainedTeacher, RulesTeacher

__all__ = ["ConstrainedTeacher", "LinearWeights", "RulesTeacher", "linear_from_rules"]
