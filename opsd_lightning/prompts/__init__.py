"""Prompts of the student and the teacher."""
