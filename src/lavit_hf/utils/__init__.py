"""What all rooms share: complete files, paths inside a directory, processes, seeds, progress, sheets of pictures."""
