"""Makes the files of code in checkpoint lavit-scenes again, after a change of the modules they are made from.

python checkpoints/refresh_code.py
"""

from __future__ import annotations

from pathlib import Path

from lavit_hf import default_checkpoint
from lavit_hf.pipelines.remote_code import write_code
from lavit_hf.remote_code.checkpoint import save_remote_code

if __name__ == "__main__":
    folder = Path(default_checkpoint())
    save_remote_code(folder)
    write_code(folder)
