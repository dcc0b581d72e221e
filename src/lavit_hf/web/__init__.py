"""A page to play with: captions, answers, drawings, and what a picture costs. `lavit demo --web` shows it.

Example:

```python
>>> from lavit_hf.web import Studio, create_demo, launch, make_examples, world_of

>>> examples = make_examples(world_of("my-lavit"))
>>> studio = Studio(model, processor, LavitTextToImagePipeline.from_pretrained("my-lavit"), examples.known)
>>> launch(create_demo(studio, examples, "my-lavit"))
```
"""

try:
    from .app import VISITORS, create_demo, launch
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    raise ImportError(f"The page needs the package `{package}`: pip install 'lavit-hf[demo]'") from error

from ..hub.facts import world_of
from .examples import Examples, given_examples, make_examples
from .studio import Drawing, Look, Studio, Token

__all__ = [
    "VISITORS",
    "Drawing",
    "Examples",
    "Look",
    "Studio",
    "Token",
    "create_demo",
    "given_examples",
    "launch",
    "make_examples",
    "world_of",
]
