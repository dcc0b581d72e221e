"""Serving: OpenAI's endpoints over a LaVIT. `lavit serve` is this on the command line.

Example:

```python
>>> import uvicorn
>>> from lavit_hf.serving import Engine, TransformersBackend, create_app

>>> backend = TransformersBackend(model, processor, LavitTextToImagePipeline.from_pretrained("my-lavit"))
>>> uvicorn.run(create_app(Engine(backend), backend, "my-lavit"), port=8000)
```
"""

try:
    from .app import ServingLimits, create_app
    from .backend import TransformersBackend
    from .engine import Backend, Engine, Metrics
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    raise ImportError(f"Serving needs the package `{package}`: pip install 'lavit-hf[serving]'") from error

__all__ = ["Backend", "Engine", "Metrics", "ServingLimits", "TransformersBackend", "create_app"]
