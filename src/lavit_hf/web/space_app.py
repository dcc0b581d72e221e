"""The page of `lavit demo --web` as a Space: `lavit publish --space` writes this as its app.py, with a model's name.

The code of lavit_hf lies beside it. On ZeroGPU, a visitor gets an accelerator for as long as a function runs.
"""

import spaces  # first: on ZeroGPU it has to know of torch before anything uses it

from lavit_hf.web import Studio, create_demo, launch, make_examples, world_of

MODEL = "user/name"

examples = make_examples(world_of(MODEL))
studio = Studio.from_pretrained(MODEL, examples.known)
demo = create_demo(studio, examples, MODEL, on_gpu=spaces.GPU)

if __name__ == "__main__":
    launch(demo)
