"""LaVIT in ComfyUI: copy or link this folder into its `custom_nodes/`, and `pip install 'lavit-hf[pixels]'` there."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
