"""The filter: a noise-aware scorer of latents, a component of the pipeline.

The folder has the name by which a saved pipeline refers to its classes: `["minim_filter", "FilterHead"]`.
"""

import sys

import diffusers

from .filter_head import FilterHead, FilterHeadOutput


__all__ = ["FILTER_LIBRARY", "FilterHead", "FilterHeadOutput"]

# diffusers looks a component's folder up among its own pipelines, and writes it into model_index.json if it is there.
FILTER_LIBRARY = "minim_filter"
setattr(diffusers.pipelines, FILTER_LIBRARY, sys.modules[__name__])
