"""``opsd chat``: talk to the student, or to the teacher with a context."""
