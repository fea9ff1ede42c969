"""Token-level losses between student and teacher distributions."""
