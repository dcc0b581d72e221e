"""The code that travels with a checkpoint. It is made of the package's own source files; none of them is imported."""
