"""Value residuals inside other libraries. Each subpackage imports the library of its name."""
