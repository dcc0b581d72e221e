"""Files on a disk: paths that do not leave their directory, and results that are complete or not there."""
