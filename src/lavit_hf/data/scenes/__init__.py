"""A small world to learn from: pictures of colored shapes, with captions, questions and the truth.

Example:

```python
>>> from lavit_hf.data.scenes import facts_of, judge, make_scenes, parse_caption

>>> scenes = make_scenes("train", num_scenes=1000, seed=0)
>>> row = scenes[0]
>>> row["text"]
'a picture of a large blue circle above a large cyan square on a white background'
>>> facts_of(judge(row["image"])) == parse_caption(row["text"])
True
```
"""

from .dataset import make_scenes, scene_row, stream_scenes
from .language import (
    CaptionError,
    Change,
    Facts,
    ObjectFacts,
    Question,
    RelationFacts,
    ask_questions,
    captions_of,
    change_scene,
    facts_of,
    parse_caption,
    write_caption,
    write_layout,
)
from .pictures import judge, label_patches, object_coverage, render, repaint
from .world import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SIZES,
    UNKNOWN,
    PortableRng,
    Scene,
    SceneObject,
    place_of,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "HELD_OUT_PAIRS",
    "MAX_OBJECTS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "UNKNOWN",
    "CaptionError",
    "Change",
    "Facts",
    "ObjectFacts",
    "PortableRng",
    "Question",
    "RelationFacts",
    "Scene",
    "SceneObject",
    "ask_questions",
    "captions_of",
    "change_scene",
    "facts_of",
    "judge",
    "label_patches",
    "make_scenes",
    "object_coverage",
    "parse_caption",
    "place_of",
    "render",
    "repaint",
    "sample_scene",
    "scene_row",
    "stream_scenes",
    "write_caption",
    "write_layout",
]
