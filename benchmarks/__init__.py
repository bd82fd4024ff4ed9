"""What is timed (`registry`), how (`runner`), and how it is told (`report`)."""
