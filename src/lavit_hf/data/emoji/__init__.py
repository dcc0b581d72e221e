"""A world to learn from: pictures that artists drew, on colored backgrounds, with captions, questions and the truth.

Example:

```python
>>> from lavit_hf.data.emoji import facts_of, judge, make_emoji, parse_caption

>>> rows = make_emoji("train", num_scenes=1000, seed=0)
>>> row = rows[1]
>>> row["text"]
'a green background with a dog at the bottom left and a peach at the top left'
>>> facts_of(judge(row["image"])) == parse_caption(row["text"])
True
```

`sprites/NOTICE.md` names the artists and their licenses.
"""

from .dataset import EmojiBatch, emoji_row, make_emoji, stream_batches
from .judging import judge
from .language import (
    CaptionError,
    Change,
    Facts,
    ObjectFacts,
    Question,
    ask_questions,
    captions_of,
    change_scene,
    facts_of,
    parse_caption,
    write_caption,
    write_layout,
)
from .looks import Looks, draw_looks
from .pictures import IMAGE_SIZE, PatchLabels, label_patches, object_area, render, render_scenes
from .sprites import Pack, load_pack
from .world import (
    BACKGROUNDS,
    MAX_OBJECTS,
    PLACES,
    SIZES,
    SPLITS,
    UNKNOWN,
    UNSEEN_ARTIST,
    Scene,
    SceneArrays,
    SceneObject,
    is_held_out,
    redraw,
    sample_scene,
    sample_scenes,
)

__all__ = [
    "BACKGROUNDS",
    "IMAGE_SIZE",
    "MAX_OBJECTS",
    "PLACES",
    "SIZES",
    "SPLITS",
    "UNKNOWN",
    "UNSEEN_ARTIST",
    "CaptionError",
    "Change",
    "EmojiBatch",
    "Facts",
    "Looks",
    "ObjectFacts",
    "Pack",
    "PatchLabels",
    "Question",
    "Scene",
    "SceneArrays",
    "SceneObject",
    "ask_questions",
    "captions_of",
    "change_scene",
    "draw_looks",
    "emoji_row",
    "facts_of",
    "is_held_out",
    "judge",
    "label_patches",
    "load_pack",
    "make_emoji",
    "object_area",
    "parse_caption",
    "redraw",
    "render",
    "render_scenes",
    "sample_scene",
    "sample_scenes",
    "stream_batches",
    "write_caption",
    "write_layout",
]
