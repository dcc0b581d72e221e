"""What all rooms share, each idea once: files that are complete or not there, JSON, safetensors, processes, seeds, bars."""
