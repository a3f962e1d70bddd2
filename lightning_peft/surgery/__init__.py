"""Reading and editing a model: anatomy, targets, edits, injection. Knows no method."""
