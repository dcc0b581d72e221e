"""What all rooms share, each idea once: complete files, JSON, safetensors, processes, seeds, progress bars."""
